import sys, os
sys.path.insert(0, os.path.dirname(__file__))
from bench import *
V = []
def v(kind, K, tile=None, module="new", set=None, **extra):
    V.append(dict(set=set or {'_WAIT': 2}, kind=kind, K=K, tile=tile, module=module, extra=extra, name=f"{kind} {module} {tile or ''} {extra or ''} {set or ''}"))
v("fwd", 5); v("bwd", 5, module="base"); v("bwd", 5)
v("fwd", 7); v("bwd", 7); v("dw", 7)
v("fwd", 3); v("fwd", 3, (4, 4, 2, 4, 4, 1584)); v("bwd", 3);
v("fwd", 5, set={"_WAIT": -99}); v("fwd", 3, set={"_WAIT": -99}); v("bwd", 5, set={"_WAIT": -99})
if __name__ == "__main__":
    main(V)
