import sys, os
sys.path.insert(0, os.path.dirname(__file__))
from bench import *
V = []
def v(kind, K, tile=None, module="new", **extra):
    V.append(dict(kind=kind, K=K, tile=tile, module=module, extra=extra, name=f"{kind} {module} {tile or ''} {extra or ''}"))
v("fwd", 5, (4, 4, 2, 4, 2, 1584), maxnreg=168); v("fwd", 5, (4, 4, 2, 1, 2, 1584), maxnreg=168)
v("bwd", 5, (4, 4, 2, 1, 2, 1056)); v("bwd", 5, (4, 4, 2, 1, 1, 1056, 2)); v("bwd", 5, (4, 4, 2, 1, 1, 1056))
v("fwd", 7); v("slope", 7); v("dx", 7)
v("dw", 7, (4, 4, 2, 1, 2, 1056)); v("dw", 7, (4, 4, 2, 1, 1, 1056, 2)); v("bwd", 7)
v("fwd", 3); v("fwd", 3, (4, 7, 2, 4, 2, 1584)); v("bwd", 3); v("bwd", 3, (4, 7, 2, 1, 2, 1056)); v("bwd", 3, (4, 4, 2, 1, 2, 1584), maxnreg=168)
if __name__ == "__main__":
    main(V, [(s, ("float16", "bfloat16", "float32")[(s if s != 9 else 0) % 3]) for s in (9, *range(9), *range(10, 16))])
