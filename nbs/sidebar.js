// The renderer's section headings are links without a target, which a keyboard can't reach: here they become buttons.
document.querySelectorAll('#quarto-sidebar a[data-bs-toggle="collapse"]').forEach(a => {
  a.setAttribute("role", "button");
  a.setAttribute("aria-controls", (a.dataset.bsTarget || "").slice(1));
  if (a.classList.contains("sidebar-item-toggle")) { a.setAttribute("aria-hidden", "true"); return; }
  a.tabIndex = 0;
  a.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); a.click(); } });
});
