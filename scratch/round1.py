import sys, os
sys.path.insert(0, os.path.dirname(__file__))
from bench import *
V = []
def v(kind, K, tile=None, module="new", **extra):
    V.append(dict(kind=kind, K=K, tile=tile, module=module, extra=extra, name=f"{kind} {module} {tile or ''} {extra or ''}"))
for K in (5, 7, 3):
    v("fwd", K, module="base"); v("fwd", K)
    if K < 7: v("bwd", K, module="base"); v("bwd", K)
v("fwd", 3, (4, 4, 2, 4, 2, 2112)); v("fwd", 3, (4, 7, 2, 4, 2, 1584)); v("fwd", 3, (4, 4, 2, 4, 4, 2112)); v("fwd", 3, (4, 4, 2, 4, 2, 1584))
v("fwd", 5, (4, 4, 2, 4, 2, 1584), maxnreg=168); v("fwd", 5, (4, 4, 2, 4, 2, 1056)); v("fwd", 5, (4, 2, 2, 4, 2, 2112))
v("fwd", 5, (4, 7, 2, 4, 1, 1056))
v("fwd", 7, (4, 4, 2, 4, 1, 1056))
v("bwd", 3, (4, 4, 2, 1, 2, 1056)); v("bwd", 3, (4, 4, 2, 1, 2, 1584), maxnreg=168); v("bwd", 3, (4, 7, 2, 1, 2, 1056))
v("bwd", 5, (4, 4, 2, 1, 1, 1056))
v("dw", 7, (4, 4, 2, 1, 2, 1056)); v("dw", 7, (4, 4, 2, 1, 1, 1056, 2)); v("bwd", 5, (4, 4, 2, 1, 1, 1056, 2)); v("fwd", 7, (4, 4, 2, 4, 1, 1056, 2))
for kind in ("slope", "dx", "dw"):
    v(kind, 7, module="base"); v(kind, 7)

def nine():
    """The test that failed."""
    import torch, random
    sys.path[:0] = ["tests", "tests/kernels"]
    import test_depthwise_conv as t
    ms = modules()
    draw = random.Random(9)
    shape = (draw.randint(1, 4), draw.randint(1, 60), draw.randint(1, 60), draw.choice([5, 24, 32, 64, 96, 128]))
    size = draw.choice([3, 5, 7])
    if CPU: shape = (1, 4, 5, 32)
    for dtype in (torch.float16, torch.bfloat16):
        call = t._random_call(9, dtype, shape, size)
        for name in ("base", "new"):
            import vitrail.kernels.depthwise_conv.op as op
            sys.modules["vitrail.kernels.depthwise_conv.triton"] = ms[name]
            runs = []
            for f in (lambda: call.run(torch.float64, "eager"), lambda: call.run(dtype, "eager"), lambda: call.run(dtype, "triton"), lambda: call.run(dtype, "triton")):
                try: runs.append(f())
                except Exception as e: print("NINE", dtype, name, len(runs), "raised", repr(e)[:500]); runs.append(None)
            if None in runs: continue
            for n, e, th, o, o2 in zip(["out", *call.tensors], *runs):
                s = e.norm() + 1e-12
                print("NINE", dtype, name, n, "eager %.3g" % float((th.double() - e).norm() / s), "ours %.3g" % float((o.double() - e).norm() / s),
                      "finite", bool(o.isfinite().all()), "eager finite", bool(th.isfinite().all()), "same", torch.equal(o, o2), "worst", float((o.double()-e).abs().max()), flush=True)
            sys.modules["vitrail.kernels.depthwise_conv.triton"] = ms["new"]

if __name__ == "__main__":
    main(V, nine)
