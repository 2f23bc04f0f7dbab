// The renderer's section headings are links without a target, which a keyboard can't reach: here they become buttons.
document.querySelectorAll('#quarto-sidebar a[data-bs-toggle="collapse"]').forEach(a => {
  a.setAttribute("role", "button");
  a.setAttribute("aria-controls", (a.dataset.bsTarget || "").slice(1));
  if (a.classList.contains("sidebar-item-toggle")) { a.setAttribute("aria-hidden", "true"); return; }
  a.tabIndex = 0;
  a.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); a.click(); } });
});
// Of the results of a search, those whose name is exactly what was typed come first.
document.querySelectorAll(".smalldocs-search").forEach(box => {
  const input = box.querySelector("input"), results = box.querySelector(".smalldocs-search-results");
  new MutationObserver(() => {
    const name = input.value.trim().toLowerCase();
    const exact = [...results.children].filter(a => a.hash && decodeURIComponent(a.hash.slice(1)).toLowerCase() === name);
    if (exact.length && results.firstChild !== exact[0]) results.prepend(...exact);
  }).observe(results, { childList: true });
});
// A formula that is wider than its column scrolls; then it can be reached and scrolled with the keyboard.
addEventListener("load", () => {
  const formulas = document.querySelectorAll(".katex-display");
  const reach = o => {
    const wide = o.scrollWidth > o.clientWidth, facts = { tabindex: 0, role: "group", "aria-label": "Formula, scrolls sideways" };
    for (const [name, value] of Object.entries(facts)) wide ? o.setAttribute(name, value) : o.removeAttribute(name);
  };
  const sizes = new ResizeObserver(all => all.forEach(o => reach(o.target)));
  formulas.forEach(o => sizes.observe(o));
  document.fonts.ready.then(() => formulas.forEach(reach));
});
