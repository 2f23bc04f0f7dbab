"""DeepSeek's language models as a book that runs"""

__version__ = "0.1.0"

from importlib import import_module

# Names load when first asked for, so importing the package imports no PyTorch: where each lives, then the chapters that patch methods on it
_HOMES = {'Config': 'core', 'Cache': 'arch.cache', 'Model': 'arch.model', 'Tokenizer': 'infer.tokenizer'}
_PATCHES = {'Config': ('releases',), 'Tokenizer': ('infer.chat',), 'Model': ('releases', 'infer.checkpoint', 'infer.load', 'infer.generate')}


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module 'deepseek_nb' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    module, *_ = [import_module(f'.{o}', __name__) for o in (_HOMES[name], *_PATCHES.get(name, ()))]
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__(): return sorted({*globals(), *_HOMES})
