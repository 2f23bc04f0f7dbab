"Wrong answers of the exercises that have no mistakes of their own: three each, and none may pass"
import math
import re
from functools import reduce
from operator import xor

import torch
import torch.nn.functional as F

from deepseek_nb.arch.norm import rms_norm
from deepseek_nb.exercises import exercises
from deepseek_nb.files.tokenizer import merge
from deepseek_nb.infer.generate import left_padded

KNOWN = exercises()
WRONG = {
    'split-heads': (
        lambda x, h: x.unflatten(-1, (-1, h)).permute(0, 3, 1, 2),
        lambda x, h: x.unflatten(-1, (h, -1)),
        lambda x, h: x.reshape(len(x), h, x.shape[1], -1),
    ),
    'scaled-scores': (
        lambda q, k, a: a*k@q.T,
        lambda q, k, a: q@k.T,
        lambda q, k, a: (q@k.T)**a,
    ),
    'byte-pieces': (
        lambda x, i, n: (x[i:i+n], x[i:i+n]),
        lambda x, i, n: (x[i:i+n], x[i+1:i+n]),
        lambda x, i, n: (x[i+1:i+n+1], x[i:i+n]),
    ),
    'loss-to-choices': (
        lambda x: 2**x,
        lambda x: x,
        lambda x: math.exp(-x),
    ),
    'apply-merges': (
        lambda w, r: [*w],
        lambda w, r: merge(w, {p: -i for p,i in r.items()}),
        lambda w, r: merge(w, dict.fromkeys(r, 0)),
    ),
    'byte-spelling': (
        lambda x, a: x.replace(' ', 'Ġ'),
        lambda x, a: ''.join(map(chr, x.encode())),
        lambda x, a: ''.join(a[ord(c)%256] for c in x),
    ),
    'last-logits': (
        lambda x, w, e, h: x[:, -1]@h.T,
        lambda x, w, e, h: rms_norm(x[:, 0], w, e)@h.T,
        lambda x, w, e, h: rms_norm(x, w, e)@h.T,
    ),
    'model-parameters': (
        lambda w, d, f, t: 2*w*d + 3*d*f,
        lambda w, d, f, t: w*d*(2 - t) + 2*d*f,
        lambda w, d, f, t: w*d*(1 + t) + 3*d*f,
    ),
    'two-residuals': (
        lambda x, a, f, n: x + a(n(x)) + f(n(x)),
        lambda x, a, f, n: f(n(x + a(n(x)))),
        lambda x, a, f, n: (y := x + a(x)) + f(y),
    ),
    'active-parameters': (
        lambda k, s, d, f: k*3*d*f,
        lambda k, s, d, f: (k + s)*2*d*f,
        lambda k, s, d, f: k*s*3*d*f,
    ),
    'query-rows': (
        lambda h, n, r: h*n,
        lambda h, n, r: h*n + r,
        lambda h, n, r: n + r,
    ),
    'moe-layers': (
        lambda n, d, m: [i > d and i%m == 0 for i in range(n)],
        lambda n, d, m: [i >= d for i in range(n)] if m == 2 else [True]*n,
        lambda n, d, m: [i < d for i in range(n)],
    ),
    'checkpoint-bytes': (
        lambda s, n: sum(math.prod(o) for o in s),
        lambda s, n: n*sum(map(sum, s)),
        lambda s, n: n*sum(map(len, s)),
    ),
    'fuse-gate-up': (
        lambda g, u: torch.cat([torch.stack(u), torch.stack(g)], 1),
        lambda g, u: torch.cat([torch.stack(g), torch.stack(u)], 2),
        lambda g, u: torch.stack([torch.stack(g), torch.stack(u)], 2).flatten(1, 2),
    ),
    'left-pad': (
        lambda p, n: tuple(o.flip(1) for o in left_padded(p, n)),
        lambda p, n: (left_padded(p, n)[0], 1 - left_padded(p, n)[1]),
        lambda p, n: left_padded(p),
    ),
    'hold-back': (
        lambda x, s: x,
        lambda x, s: x[:1 - len(s)],
        lambda x, s: x.replace(s[0], ''),
    ),
    'mtp-labels': (
        lambda x, k: torch.cat([x[k:], x.new_full((k,), -100)]),
        lambda x, k: x.roll(-k - 1),
        lambda x, k: x[k+1:],
    ),
    'mtp-input': (
        lambda h, e, w: torch.cat([h, e], 1)@w.T,
        lambda h, e, w: (w[:, :4]@e.T + w[:, 4:]@h.T).T,
        lambda h, e, w: F.rms_norm(torch.cat([h, e], 1), (8,))@w.T,
    ),
    'choose-twin': (
        lambda o, k: k[0] if k else 'reference',
        lambda o, k: next((x for x in o[::-1] if x in k), 'reference'),
        lambda o, k: next((x for x in o if x in k), 'none'),
    ),
    'twin-error': (
        lambda a, b: (a - b).abs().max(),
        lambda a, b: ((a - b)/a).abs().max(),
        lambda a, b: (a - b).abs().mean()/a.abs().max(),
    ),
    'relative-error': (
        lambda a, b: (a - b).norm(),
        lambda a, b: (a - b).square().sum()/a.square().sum(),
        lambda a, b: a.norm()/b.norm() - 1,
    ),
    'half-step': (
        lambda w, b: w.abs().max()/(2**(b - 1) - 1),
        lambda w, b: w.abs().max()/2**b,
        lambda w, b: (w.max() - w.min())/(2**b - 1)/2,
    ),
    'int8-product': (
        lambda x, c, s: x@c.T,
        lambda x, c, s: x@c.T*s.mean(),
        lambda x, c, s: x@c.T/s[:, 0],
    ),
    'power-scale': (
        lambda a: a/448,
        lambda a: 2.**(a/448).log2().floor(),
        lambda a: 2.**a.log2().ceil(),
    ),
    'block-maxima': (
        lambda w, n: w.unflatten(1, (-1, n)).unflatten(0, (-1, n)).amax((1, 3)),
        lambda w, n: w.abs().unflatten(1, (-1, n)).amax(2),
        lambda w, n: w.abs().unflatten(1, (n, -1)).unflatten(0, (n, -1)).amax((1, 3)),
    ),
    'hessian': (
        lambda x, a: x.T@x,
        lambda x, a: x.T@x + a*torch.eye(x.shape[1]),
        lambda x, a: (h := x.T@x) + a*h.mean(),
    ),
    'spread-error': (
        lambda w, q, h: w[:, 1:] + torch.outer(w[:, 0] - q, h[1:]/h[0]),
        lambda w, q, h: w[:, 1:] - torch.outer(w[:, 0] - q, h[1:]),
        lambda w, q, h: w[:, 1:],
    ),
    'intensity': (
        lambda m, n, k, b: m*n*k/b/(m*k + k*n + m*n),
        lambda m, n, k, b: 2*m*n*k/b/(m*k + k*n),
        lambda m, n, k, b: 2*m*n*k/(m*k + k*n + m*n),
    ),
    'tile-count': (
        lambda m, n, t: (m//t)*(n//t),
        lambda m, n, t: -(-m*n//t//t),
        lambda m, n, t: (m//t + 1)*(n//t + 1),
    ),
    'online-softmax': (
        lambda m, l, x: (torch.maximum(m, x.max()), l + (x - torch.maximum(m, x.max())).exp().sum()),
        lambda m, l, x: (x.max(), l*(m - x.max()).exp() + (x - x.max()).exp().sum()),
        lambda m, l, x: (torch.maximum(m, x.max()), l + x.exp().sum()),
    ),
    'merge-parts': (
        lambda a, s, b, t: (a + b)/2,
        lambda a, s, b, t: (s*a + t*b)/(s + t),
        lambda a, s, b, t: a*s.exp() + b*t.exp(),
    ),
    'find-page': (
        lambda p, n, t: (p//n, p%n),
        lambda p, n, t: (t[p%len(t)], p//len(t)),
        lambda p, n, t: (t[p//n], p),
    ),
    'pages-needed': (
        lambda t, n: t//n,
        lambda t, n: t//n + 1,
        lambda t, n: t/n,
    ),
    'split-budget': (
        lambda n, b: [min(x, b) for x in n],
        lambda n, b: [x if sum(n[:i + 1]) <= b else 0 for i,x in enumerate(n)],
        lambda n, b: [min(x, b//len(n)) for x in n],
    ),
    'mean-wait': (
        lambda a, b: b.mean(),
        lambda a, b: (b - a).max(),
        lambda a, b: (a - b).mean(),
    ),
    'accepted': (
        lambda a, b: int((a == b).sum()),
        lambda a, b: int((a == b).all())*len(a),
        lambda a, b: int((a == b).long().cumprod(0).sum()) + 1,
    ),
    'thread-index': (
        lambda b, t, n: t*n + b,
        lambda b, t, n: b + t,
        lambda b, t, n: (b - 1)*n + t,
    ),
    'butterfly': (
        lambda x, m: x + x.roll(m),
        lambda x, m: x[torch.arange(32) ^ m],
        lambda x, m: x + x[(torch.arange(32) | m)],
    ),
    'strided-sums': (
        lambda x, n: torch.stack([o.sum() for o in x.tensor_split(n)]),
        lambda x, n: x.sum().expand(n).clone()/n,
        lambda x, n: x[:len(x)//n*n].view(-1, n).sum(0),
    ),
    'norm-bytes': (
        lambda n, d, b: b*(n*d + d),
        lambda n, d, b: b*(2*n*d),
        lambda n, d, b: 2*n*d + d,
    ),
    'indexer-score': (
        lambda q, w, k: (w@(q@k.T)).relu(),
        lambda q, w, k: (q@k.T).relu().sum(0),
        lambda q, w, k: w@(q@k.T),
    ),
    'select-keys': (
        lambda x, k: x > x.topk(k).values[:, -1:],
        lambda x, k: x >= x.topk(k, dim=0).values[-1],
        lambda x, k: x <= x.topk(k, largest=False).values[:, -1:],
    ),
    'window-mask': (
        lambda s, n: torch.ones(s, s).tril().triu(-n).bool(),
        lambda s, n: torch.ones(s, s).tril().bool(),
        lambda s, n: torch.ones(s, s).triu().tril(n - 1).bool(),
    ),
    'sink-softmax': (
        lambda x, s: x.softmax(0),
        lambda x, s: (x - s).softmax(0),
        lambda x, s: x.exp()/(x.exp().sum() + s),
    ),
    'compress': (
        lambda x, z, n: x.unflatten(0, (-1, n)).mean(1),
        lambda x, z, n: (z.softmax(0)*x).unflatten(0, (-1, n)).sum(1),
        lambda x, z, n: (z.softmax(1)*x).unflatten(0, (-1, n)).sum(1),
    ),
    'finished-entries': (
        lambda p, n: p//n,
        lambda p, n: -(-(p + 1)//n),
        lambda p, n: (p + 1)/n,
    ),
    'sinkhorn': (
        lambda x, n: x.softmax(1),
        lambda x, n: KNOWN['sinkhorn'].reference(x.T, n).T,
        lambda x, n: x.exp()/x.exp().sum(),
    ),
    'mix-streams': (
        lambda x, m, y, b: m.T@x + b[:, None]*y,
        lambda x, m, y, b: m@x + y,
        lambda x, m, y, b: x + b[:, None]*y,
    ),
    'hash-route': (
        lambda i, t: t[:len(i)],
        lambda i, t: t[i, :1],
        lambda i, t: t[i].sort(1).values,
    ),
    'hash-weights': (
        lambda x, i: x.gather(1, i),
        lambda x, i: x.topk(3).values/x.topk(3).values.sum(1, keepdim=True),
        lambda x, i: x.gather(1, i).softmax(1),
    ),
    'ngrams': (
        lambda x, n: F.pad(x, (0, n - 1)).unfold(0, n, 1),
        lambda x, n: x.unfold(0, n, 1),
        lambda x, n: F.pad(x, (n - 1, 0)).unfold(0, n, 1).flip(1),
    ),
    'hash-slot': (
        lambda g, f, n: sum(a*b for a,b in zip(g, f, strict=True))%n,
        lambda g, f, n: reduce(xor, g)%n,
        lambda g, f, n: reduce(xor, (x*y for x,y in zip(g, f, strict=True))),
    ),
    'draft-gain': (
        lambda n, c: n/(1 + c),
        lambda n, c: (n + 1)/c,
        lambda n, c: (n + 1)*(1 - c),
    ),
    'all-kept': (
        lambda p: p,
        lambda p: p.prod().expand(6).clone(),
        lambda p: p.cumsum(0)/torch.arange(1, 7),
    ),
    'whose-selection': (
        lambda m: [*range(len(m))],
        lambda m: [0]*len(m),
        lambda m: [i if o == 'full' else i - 1 for i,o in enumerate(m)],
    ),
    'entry-bytes': (
        lambda t, n, w, b: t*w*b/8,
        lambda t, n, w, b: -(-t//n)*w*b/8,
        lambda t, n, w, b: t//n*w*b,
    ),
    'expert-choices': (
        lambda e, k: e**k,
        lambda e, k: math.perm(e, k),
        lambda e, k: e*k,
    ),
    'decode-bound': (
        lambda n, b, w: w/(n*b),
        lambda n, b, w: w/n,
        lambda n, b, w: n*b/8/w,
    ),
    'document-mask': (
        lambda d: d[:, None] == d,
        lambda d: torch.ones(len(d), len(d)).tril().bool(),
        lambda d: (d[:, None] == d) & torch.ones(len(d), len(d)).tril(-1).bool(),
    ),
    'decayed': (
        lambda s: [True]*len(s),
        lambda s: [len(o) == 1 for o in s],
        lambda s: [len(o) == 2 for o in s],
    ),
    'wsd': (
        lambda s, w, d, n: min(1, s/w),
        lambda s, w, d, n: min(s/w, (n - s)/(n - w)),
        lambda s, w, d, n: min(1, (n - s)/d),
    ),
    'high-loss': (
        lambda o, x: x > 2*sum(o)/len(o) + 1,
        lambda o, x: x > 2*sorted(o)[4],
        lambda o, x: x > max(o),
    ),
    'throughput': (
        lambda n, s, k: (n/s)[-k:].mean(),
        lambda n, s, k: n.sum()/s.sum(),
        lambda n, s, k: n[-1]/s[-1],
    ),
    'max-violation': (
        lambda n: n.max()/n.mean(),
        lambda n: n.max()/n.sum(),
        lambda n: (n - n.mean()).abs().mean()/n.mean(),
    ),
    'sequence-balance': (
        lambda x, i: (i.flatten().bincount(minlength=5)/i.numel()*(x/x.sum(1, keepdim=True)).mean(0)).sum(),
        lambda x, i: (i.flatten().bincount(minlength=5)*5/i.numel()*x.mean(0)).sum(),
        lambda x, i: (i[:, 0].bincount(minlength=5)*5/len(i)*(x/x.sum(1, keepdim=True)).mean(0)).sum(),
    ),
    'training-days': (
        lambda n, t, f: 2*n*t/f/86400,
        lambda n, t, f: 6*n*t/f/3600,
        lambda n, t, f: 6*n*t*f/86400,
    ),
    'held-out-gap': (
        lambda a, b: b/a,
        lambda a, b: b - a,
        lambda a, b: 2.718281828**(a - b),
    ),
    'adapter-parameters': (
        lambda o, i, n: o*i,
        lambda o, i, n: n*o*i,
        lambda o, i, n: 2*n*o,
    ),
    'qlora-bytes': (
        lambda o, i, n: o*i*4 + 4*n*(o + i),
        lambda o, i, n: o*i/2 + n*(o + i)/2,
        lambda o, i, n: o*i/2,
    ),
    'reverse-kl': (
        lambda s, q: F.kl_div(s.log_softmax(-1), q.softmax(-1), reduction="batchmean"),
        lambda s, q: F.kl_div(q.log_softmax(-1), s.softmax(-1), reduction="sum"),
        lambda s, q: (s.softmax(-1)*(s - q)).sum(-1).mean(),
    ),
    'boxed-answer': (
        lambda x: (re.findall(r'\\boxed\{([^{}]*)\}', x) + [''])[0],
        lambda x: x.rpartition('\\boxed{')[2],
        lambda x: ([''] + re.findall(r'\d+', x.replace('}', '')))[0],
    ),
    'format-reward': (
        lambda x: float('<think>' in x and '</think>' in x),
        lambda x: float(x.startswith('<think>') and x.count('</think>') == 1),
        lambda x: float(x.startswith('<think>') and bool(x.split('</think>')[-1].strip())),
    ),
    'exact-kl': (
        lambda a, b: (b.exp()*(b - a)).sum(-1),
        lambda a, b: (a - b).sum(-1),
        lambda a, b: (a.exp()*(a - b)).mean(-1),
    ),
    'answer-mask': (
        lambda x, n, e: torch.arange(len(x)) >= n,
        lambda x, n, e: (torch.arange(len(x)) >= n) & (x != e),
        lambda x, n, e: (torch.arange(len(x)) >= n) & (torch.arange(len(x)) <= (x == e).nonzero()[0, 0]),
    ),
    'repeat-prompts': (
        lambda p, g: p*g,
        lambda p, g: [o for o in p for _ in range(g + 1)],
        lambda p, g: sorted(p*g)[::-1],
    ),
    'grpo-objective': (
        lambda p, a, k, e, b: (p*a - b*k).mean(),
        lambda p, a, k, e, b: (torch.min(p*a, p.clamp(1 - e, 1 + e)*a) + b*k).mean(),
        lambda p, a, k, e, b: torch.min(p*a, p.clamp(1 - e, 1 + e)*a).mean(),
    ),
    'useful-groups': (
        lambda x: x.sum(1) > 0,
        lambda x: x.mean(1) < 1,
        lambda x: x[:, 0] != x[:, 1],
    ),
    'pass-at-k': (
        lambda n, c, k: c/n,
        lambda n, c, k: 1 - (1 - c/n)**k,
        lambda n, c, k: min(1, c*k/n),
    ),
    'majority': (
        lambda x: x[0],
        lambda x: min(x, key=x.count),
        lambda x: max(sorted(x), key=x.count),
    ),
}
