"""Times variants. argv: file with VARIANTS."""
import os, sys, time, importlib, random, traceback
import multiprocessing as mp
CPU = os.environ.get("TRITON_INTERPRET") == "1"
MAPS = [(2, 6, 8), (2, 5, 8)] if CPU else [(64, 56, 96), (64, 28, 192), (64, 14, 384)]
T0 = time.time()

def modules():
    import torch
    from vitrail.kernels.depthwise_conv import triton as new
    from vitrail.kernels.depthwise_conv import triton_base as base
    for m in (new, base):
        if not hasattr(m, "_plain_options"):
            m._plain_options = m._tile_options
            m._extra = {}
            m._tile_options = lambda *a, m=m: m._plain_options(*a) | m._extra
            m._tables = dict(m._TILES), dict(m._GRADIENT_TILES)
    return {"new": new, "base": base}

def choose(m, K, v):
    m._TILES[K] = m._tables[0][K]; m._GRADIENT_TILES[K] = m._tables[1][K]; m._extra = dict(v.get("extra", {}))
    if v.get("tile"): (m._GRADIENT_TILES if v["kind"] in ("bwd", "dw") else m._TILES)[K] = m.Tile(*v["tile"])
    for k, x in v.get("set", {}).items(): setattr(m, k, x)

def data(K, shape, dtype=None):
    import torch
    b, s, c = shape
    dev = "cpu" if CPU else "cuda"
    dtype = dtype or torch.bfloat16
    g = torch.Generator(dev).manual_seed(K)
    r = lambda *n: torch.randn(*n, device=dev, generator=g)
    return dict(x=r(b, s, s, c).to(dtype), w=(r(c, 1, K, K) / K).to(dtype), b=r(c).to(dtype), res=r(b, s, s, c).to(dtype), g=r(b, s, s, c).to(dtype))

def run(m, kind, K, d):
    gelu, skip = K == 7, K == 3
    if kind == "fwd":
        return (m.depthwise_conv_forward(d["x"], d["w"], d["b"], None, d["res"] if K == 5 else None, (0, 0), gelu, skip),)
    if kind == "bwd":
        return m.depthwise_conv_backward(d["g"], d["x"], d["w"], d["b"], None, (0, 0), gelu, skip)
    taps = m._taps(d["w"])
    if kind == "slope":
        return (m._convolve(d["x"], taps, d["b"], None, (0, 0), d["g"], "slope"),)
    if kind == "dx":
        return (m._convolve(d["g"], taps, other=None, role="add", turned=True),)
    if kind == "dw":
        return m._gradients(d["g"], d["x"], taps, d["b"], None, (0, 0), False, False)

def compile_one(job):
    v, shape = job
    try:
        import torch
        m = modules()[v["module"]]
        choose(m, v["K"], v)
        small = (1, 8, shape[2])  # the constants are those of the width
        run(m, v["kind"], v["K"], data(v["K"], small))
        if not CPU: torch.cuda.synchronize()
        return None
    except Exception:
        return f"{v['name']} {shape}: " + traceback.format_exc(limit=-2)[-600:]

def timed(fns, n):
    """us of one call; fns rotate."""
    import torch
    for f in fns: f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        keep = [fns[i % len(fns)]() for i in range(n)]
    for _ in range(2): g.replay()
    ts = []
    for _ in range(7):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize()
        ts.append(a.elapsed_time(b) * 1e3 / n)
    del keep, g
    return sorted(ts)[len(ts) // 2]

def check_one(job):
    seed, dtype = job
    try:
        sys.path[:0] = ["tests", "tests/kernels"]
        import torch, test_depthwise_conv as t
        draw = random.Random(seed)
        shape = (draw.randint(1, 4), draw.randint(1, 60), draw.randint(1, 60), draw.choice([5, 24, 32, 64, 96, 128]))
        size = draw.choice([3, 5, 7])
        if CPU: shape, seed = (1, 3, 5, 4), seed
        t._random_call(seed, getattr(torch, dtype), shape, size).check_fused(getattr(torch, dtype))
        return f"test {seed} {dtype} passed"
    except Exception:
        return f"TEST {seed} {dtype} FAILED " + traceback.format_exc(limit=-2)[-900:]

def want_of(kind, K, d):
    import torch
    from vitrail.kernels.depthwise_conv.reference import depthwise_conv_reference as ref
    x, w, b = (d[k].detach().requires_grad_() for k in "xwb")
    pre = ref(x, w, b, None, None, (0, 0), False, False)
    if kind == "fwd": return [ref(d["x"], d["w"], d["b"], None, d["res"] if K == 5 else None, (0, 0), K == 7, K == 3).detach().float()]
    if kind == "bwd": return [t.float() for t in torch.autograd.grad(ref(x, w, b, None, None, (0, 0), K == 7, K == 3), (x, w, b), d["g"])]
    if kind == "slope":
        p = pre.detach().float().requires_grad_()
        return [torch.autograd.grad(torch.nn.functional.gelu(p), p, d["g"].float())[0]]
    dx, dw, db = torch.autograd.grad(pre, (x, w, b), d["g"])
    return [dx.float()] if kind == "dx" else [torch.cat((dw.flatten(1).t(), db[None])).float()]

def main(variants, tests=()):
    jobs = [(v, s) for v in variants for s in MAPS]
    if CPU:
        print(check_one(tests[0]), check_one(tests[1]))
    else:
        with mp.get_context("spawn").Pool(16) as pool:
            a, b = pool.imap_unordered(compile_one, jobs), pool.imap_unordered(check_one, tests)
            for e in a:
                if e: print("COMPILE", e, flush=True)
            print(f"[{time.time()-T0:.0f} s] compiled", flush=True)
            for e in b: print(e, flush=True)
    print(f"[{time.time()-T0:.0f} s] tested", flush=True)
    import torch
    ms = modules()
    for K in (5, 7, 3):
        cols = {}
        for shape in MAPS:
            sets = [data(K, shape)]
            n = max(4, int(160e6 / (sets[0]["x"].numel() * 4)))
            if CPU: n = 1
            for _ in range(n - 1): sets.append({k: (t.clone() if k in ("x", "res", "g") else t) for k, t in sets[0].items()})
            want = {}
            for v in variants:
                if v["K"] != K: continue
                m = ms[v["module"]]
                try:
                    choose(m, K, v)
                    got = [t.float() for t in run(m, v["kind"], K, sets[0])]
                    if v["kind"] == "dw": got = [got[0].sum(0)]
                    if v["kind"] not in want: want[v["kind"]] = want_of(v["kind"], K, sets[0])
                    assert len([t for t in got if t.numel()]) == len(want[v["kind"]])
                    err = max(float((a - b).norm() / (b.norm() + 1e-9)) for a, b in zip([t for t in got if t.numel()], want[v["kind"]]))
                    flag = "" if err < 8e-3 else f" WRONG {err:.1e}"
                    us = err if CPU else timed([lambda d=d: run(m, v["kind"], K, d) for d in sets], 2 * n if n > 6 else 12)
                    cols.setdefault(v["name"], []).append(f"{us:7.1f}{flag}")
                except Exception as e:
                    cols.setdefault(v["name"], []).append("FAILED " + repr(e)[:200])
            del sets
        for name, x in cols.items(): print(f"[{time.time()-T0:.0f} s] K{K} {name:40s}", *x, flush=True)
