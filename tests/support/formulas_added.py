"""The types that add to W: W' and b' in float64, from the papers and PEFT's documentation.

They share no code with the package. peft_cases.Case says what a formula is given.
"""

import torch
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.waverec2d import waverec2d


def loha(W, b, t, c, g):
    rank = t["hada_w1_b"].shape[0]
    return W + (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * alpha_of(
        t, c
    ) / rank, b


def lokr(W, b, t, c, g):
    one, two = (t[n] if n in t else t[f"{n}_a"] @ t[f"{n}_b"] for n in ("lokr_w1", "lokr_w2"))
    return W + torch.kron(one, two) * alpha_of(t, c) / c["r"], b


def alpha_of(t, c):
    """The patterns of these tests are ends of names."""
    return next((v for k, v in c["alpha_pattern"].items() if t["module"].endswith(k)), c["alpha"])


def shira(W, b, t, c, g):
    return W + torch.sparse_coo_tensor(
        t["shira_indices"], t["shira_weight"], W.shape, dtype=W.dtype
    ).to_dense(), b


def miss(W, b, t, c, g):
    block = t["miss_block"]
    if c["init_weights"] == "mini":
        block = block.tile(1, W.shape[0] // block.shape[1])
    return W + block.tile(-(-W.shape[1] // len(block)), 1)[: W.shape[1]].T, b


def c3a(W, b, t, c, g):
    kernel, delta = t["c3a_kernel"], torch.zeros_like(W)
    n_out, n_in, size = kernel.shape
    for i in range(n_out):
        for j in range(n_in):
            block = torch.stack([kernel[i, j].roll(p) for p in range(size)])
            delta[i * size : (i + 1) * size, j * size : (j + 1) * size] = block / W.shape[1]
    return W + delta, b


def beft(W, b, t, c, g):
    return W, b + t["beft_bias"][0]


def delora(W, b, t, c, g):
    A, B = t["delora_A"], t["delora_B"]
    diagonal = torch.diag(t["delora_lambda"] / len(A) / (A.norm(dim=1) * B.norm(dim=0)))
    return W + B @ diagonal @ A * t["delora_w_norm"], b


def fourierft(W, b, t, c, g):
    return W + torch.fft.ifft2(scattered(W.shape, t["fourierft_spectrum"], c)).real * c["scaling"], b


def scattered(shape, spectrum, c):
    dense = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    dense[
        torch.randperm(len(dense), generator=torch.Generator().manual_seed(c["random_loc_seed"]))[
            : len(spectrum)
        ]
    ] = spectrum
    return dense.view(shape)


def gralora(W, b, t, c, g):
    A, B, k, delta = t["gralora_A"], t["gralora_B"], c["gralora_k"], torch.zeros_like(W)
    q, rows, cols = A.shape[2] // k, B.shape[2], A.shape[1]
    for m in range(k):
        for n in range(k):
            block = (A[n][:, m * q : (m + 1) * q] @ B[m][n * q : (n + 1) * q]).T
            delta[m * rows : (m + 1) * rows, n * cols : (n + 1) * cols] = block
    if c["hybrid_r"]:
        delta += t["gralora_B_general.weight"] @ t["gralora_A_general.weight"]
    return W + delta * c["alpha"] / (A.shape[2] + c["hybrid_r"]), b


def vera(W, b, t, c, g, prefix="vera_"):
    A, B = g[f"{prefix}A"][:, : W.shape[1]], g[f"{prefix}B"][: W.shape[0]]
    return W + (t[f"{prefix}lambda_b"][:, None] * B) @ (
        t[f"{prefix}lambda_d"][: B.shape[1], None] * A[: B.shape[1]]
    ), b


def pvera(W, b, t, c, g):
    return vera(W, b, t, c, g, prefix="pvera_")


def randlora(W, b, t, c, g):
    short, long = sorted(W.shape)
    n = t["randlora_lambda"].shape[1]
    A, B = g["randlora_A"][:, :, :short], g["randlora_B"][:long, :n]
    scaled = (t["randlora_lambda"][:, :, None] * A * t["randlora_gamma"]).flatten(0, 1)
    product = B.flatten(1) @ scaled
    return W + (product if W.shape[1] == short else product.T) * c["randlora_alpha"] / c["r"], b


def vblora(W, b, t, c, g):
    def mixed(side):
        if f"vblora_logits_{side}" in t:
            values, indices = t[f"vblora_logits_{side}"].topk(c["topk"])
            weights = values.softmax(-1)
        else:
            indices, most = (
                t[f"vblora_logits_{side}_topk_indices"].long(),
                t[f"vblora_logits_{side}_topk_weights"],
            )
            weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], -1)
        return torch.einsum("abk,abkv->abv", weights, g["vblora_vector_bank"][indices])

    return W + torch.einsum("orv,riw->oviw", mixed("B"), mixed("A")).reshape(W.shape), b


def waveft(W, b, t, c, g):
    coefficients = scattered(W.shape, t["waveft_spectrum"], c)
    if not c["use_idwt"]:
        return W + coefficients * c["scaling"], b
    reduction = WAVELET_REDUCTIONS[c["wavelet_family"]][0]
    shape = [(n + reduction + 1) // 2 * 2 for n in W.shape]
    top, left = ((a - n) // 2 for a, n in zip(shape, W.shape, strict=True))
    padded = torch.zeros(shape, dtype=torch.float64)
    padded[top : top + W.shape[0], left : left + W.shape[1]] = coefficients
    (a, h), (v, d) = (half.chunk(2, dim=1) for half in padded.chunk(2))
    return W + waverec2d((a, (h, v, d)), c["wavelet_family"])[: W.shape[0], : W.shape[1]] * c["scaling"], b


def lora(W, b, t, c, g):
    return W + t["lora_B.weight"] @ t["lora_A.weight"] * c["lora_alpha"] / c["r"], b


def adalora(W, b, t, c, g):
    delta = t["lora_B"] @ (t["lora_A"] * t["lora_E"])
    return W + delta * (c["lora_alpha"] or c["init_r"]) / (c["init_r"] + 1e-5), b


def supertuning(W, b, t, c, g):
    new = W.clone()
    for i, value in zip(t["supertuning_indices"].tolist(), t["supertuning_values"].tolist(), strict=True):
        new[i // W.shape[1], i % W.shape[1]] += value
    if c["r"]:
        factors = t["supertuning_lora_B.weight"] @ t["supertuning_lora_A.weight"]
        new = new + factors * c["lora_alpha"] / c["r"]
    return new, b


def unilora(W, b, t, c, g):
    A, B = (g["unilora_theta_d"][t[f"unilora_indices_{x}"]] * t[f"unilora_scales_{x}"] for x in "AB")
    return W + B @ A, b
