"""The types that multiply, rotate, project or replace W: W' and b' in float64, from the papers and PEFT's
documentation.

They share no code with the package. peft_cases.Case says what a formula is given.
"""

import torch


def ia3(W, b, t, c, g):
    by = t["ia3_l"]
    return W * by, b if b is None or by.shape[1] != 1 else b * by.flatten()


def hra(W, b, t, c, g):
    u, eye = t["hra_u"], torch.eye(W.shape[1], dtype=torch.float64)
    if c["apply_GS"]:
        q = torch.linalg.qr(u).Q
        return W @ (eye - 2 * q @ q.T), b
    for column in u.T:
        W = W @ (eye - 2 * torch.outer(column, column) / column.dot(column))
    return W, b


def bat(W, b, t, c, g):
    blocks, shards = t["miss_block"], W.shape[1] // t["miss_block"].shape[1]
    rows = [
        part @ torch.block_diag(*[m] * shards) + m.tile(1, shards)
        for part, m in zip(W.split(len(blocks[0])), blocks, strict=True)
    ]
    return W + torch.cat(rows), b


def cayley(skew):
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def oft(W, b, t, c, g, doubled=False):
    q = t["oft_R.weight"]
    size = next(n for n in range(2, 999) if n * (n - 1) // 2 == q.shape[1])
    skew = torch.zeros(len(q), size, size, dtype=q.dtype)
    for n in range(len(q)):
        skew[n, *torch.triu_indices(size, size, 1)] = q[n]
    skew = skew - skew.mT
    if c["coft"]:
        limit = c["eps"] / len(q) ** 0.5
        skew = torch.stack([m * min(1, limit / m.norm()) for m in skew])
    if c["use_cayley_neumann"]:
        last = c["num_cayley_neumann_terms"] - 1
        power = [torch.linalg.matrix_power(skew, k) for k in range(last + 1)]
        r = power[0] + 2 * sum(power[1:last]) + (2 if doubled else 1) * power[last]
    else:
        r = cayley(skew)
    return W @ torch.block_diag(
        *r, *(r[:1].repeat(W.shape[1] // size - 1, 1, 1) if c["block_share"] else [])
    ).T, b


def boft(W, b, t, c, g):
    """F_i is the rotation in the order in which neighbouring halves of blocks are 2ⁱ halves apart."""
    stored, n = t["boft_R"], W.shape[1]
    for i, blocks in enumerate(stored):
        order, half = torch.arange(n), stored.shape[-1] // 2
        if i:
            group = half * 2 ** (i + 1)
            halves = [order[g : g + group].split(half) for g in range(0, n, group)]
            order = torch.cat([torch.cat([*parts[::2], *parts[1::2]]) for parts in halves])
        p = torch.eye(n, dtype=W.dtype)[order]
        W = W @ (p @ torch.block_diag(*cayley((blocks - blocks.mT) / 2)) @ p.T).T
    return W * t["boft_s"], b


def glora(W, b, t, c, g):
    def path(name, shape):
        if f"glora_{name}.Xd" in t:
            return t[f"glora_{name}.Xd"] @ t[f"glora_{name}.Xu"]
        return t.get(f"glora_{name}.X", t.get(f"glora_{name}.zeros", torch.zeros(shape)))

    new = W + W * path("A", W.shape) + path("B", W.shape)
    if b is None:
        return new, None
    return new, b + b * path("D", b.shape) + path("E", b.shape) + (W @ path("C", (W.shape[1], 1)))[:, 0]


def hira(W, b, t, c, g):
    factor = t["hira_B"] @ t["hira_A"] if "hira_B" in t else (t["hira_embedding_B"] @ t["hira_embedding_A"]).T
    return W + W * factor, b


def road(W, b, t, c, g):
    theta, alpha, group = t["road_theta"], t["road_alpha"], c["group_size"]
    R = torch.zeros(len(W), len(W), dtype=torch.float64)
    for i in range(len(W)):
        start, within, half = i // group * group, i % group, group // 2
        partner = start + (within + half) % group
        if c["variant"] == "road_1":
            first = second = start // 2 + within % half
        elif c["variant"] == "road_2":
            first = second = i
        else:
            first, second = 2 * start + within, 2 * start + group + within
        R[i, i] = alpha[first] * theta[first].cos()
        R[i, partner] = alpha[second] * theta[second].sin() * (-1 if within < half else 1)
    return R @ W, None if b is None else R @ b


def ln_tuning(W, b, t, c, g):
    return t["ln_tuning_layers.weight"], t.get("ln_tuning_layers.bias", b)


def deft(W, b, t, c, g):
    p, r = t["deft_P"], t["deft_R"] if not c["para"] else None
    q, right = (p, p.clamp(min=0)) if c["decomposition_method"] == "relu" else [torch.linalg.qr(p)[0]] * 2
    new = W - q @ right.T @ W
    if not c["para"]:
        new = new + q @ r * (c["alpha"] / p.shape[1] if c["alpha"] else 1)
    return new, b


def osf(W, b, t, c, g):
    u, s, v = (t[f"osf_svd_params.{x}_low"] for x in "USV")
    if not len(s):
        return W, b
    high_u, high_s, high_v = (part[..., : min(W.shape) - len(s)] for part in torch.svd(W))
    return (high_u * high_s) @ high_v.T + (u * s) @ v, b


def frod(W, b, t, c, g):
    kind = "_".join(t["module"].split(".")[-2:])
    v, places = (g[f"frod_{x}.{kind}"] for x in ("V", "s_indices"))
    s = torch.diag(t["frod_lambda_l"])
    for i, j, value in zip(*places.tolist(), t["frod_lambda_s_values"].tolist(), strict=True):
        s[i, j] += value
    u = torch.nn.functional.normalize(W @ torch.linalg.inv(v).T, dim=0)
    return u.float().double() @ s @ v.T, b


def trainable_tokens(W, b, t, c, g):
    return W.index_copy(0, torch.tensor(c["token_indices"]), t["trainable_tokens_delta"]), b
