"""The chunk equations of the gated delta rule, forward and backward, written out in plain PyTorch, no autograd.

The oracle for the Triton kernels' intermediate tensors. One row per chunk and value head, padded to C tokens: padded
rows have c = its last valid value and beta = f_q = f_k = 0, exactly as the kernels keep them.
"""

import torch
from torch import Tensor

from kernels.documents import Documents

C = 64


def _chunks(documents: Documents) -> list[tuple[int, int, int]]:
    """(first token, length, document) of every chunk."""
    return [
        (begin, min(C, last - begin), i)
        for i, (first, last) in enumerate(zip(documents.bounds[:-1], documents.bounds[1:], strict=True))
        for begin in range(first, last, C)
    ]


def _rows(x: Tensor, chunks, group: int = 1) -> Tensor:
    """(T, heads, ...) -> (NC, heads * group, C, ...), zero in padded rows."""
    padded = x.new_zeros(len(chunks), C, *x.shape[1:])
    for row, (begin, length, _) in zip(padded, chunks, strict=True):
        row[:length] = x[begin : begin + length]
    return padded.transpose(1, 2).repeat_interleave(group, 1)


def _tokens(x: Tensor, chunks) -> Tensor:
    """(NC, heads, C, ...) -> (T, heads, ...)."""
    return torch.cat([row[:, :length].transpose(0, 1) for row, (_, length, _) in zip(x, chunks, strict=True)])


def forward(q, k, v, a, b, A_log, dt_bias, documents, initial_state=None) -> dict[str, Tensor]:
    """Every tensor of the forward pass by its name in docs/gated-delta-rule.md."""
    chunks, group, dk = _chunks(documents), v.shape[1] // k.shape[1], k.shape[2]
    Q, K, V = _rows(q, chunks, group), _rows(k, chunks, group), _rows(v, chunks)
    valid = _rows(torch.ones_like(v[..., 0]), chunks)
    rq, rk = ((valid * (x.square().sum(-1) + 1e-6).rsqrt())[..., None] for x in (Q, K))
    fq, fk = rq * dk**-0.5, rk
    g = _rows(-A_log.exp() * torch.nn.functional.softplus(a + dt_bias), chunks)
    beta = _rows(b.sigmoid(), chunks)[..., None]
    c = g.cumsum(-1)[..., None]
    keep = c[..., -1:, :].exp()
    D = (c - c.mT).masked_fill(torch.ones(C, C).triu(1).bool(), float("-inf")).exp()
    G = fk * fk.mT * (K @ K.mT)
    P = fq * fk.mT * (Q @ K.mT) * D
    M = (torch.eye(C, dtype=v.dtype) + (beta * G * D).tril(-1)).inverse()
    S = torch.empty(len(chunks), v.shape[1], dk, v.shape[2], dtype=v.dtype)
    R, O = torch.empty_like(V), torch.empty_like(V)
    final = torch.empty(len(documents), *S.shape[1:], dtype=v.dtype)
    for j, (begin, length, i) in enumerate(chunks):
        if begin == documents.bounds[i]:
            state = torch.zeros_like(S[0]) if initial_state is None else initial_state[i]
        S[j] = state
        R[j] = M[j] @ (beta[j] * (V[j] - c[j].exp() * fk[j] * (K[j] @ state)))
        O[j] = c[j].exp() * fq[j] * (Q[j] @ state) + P[j] @ R[j]
        state = keep[j] * state + K[j].mT @ ((c[j][..., -1:, :] - c[j]).exp() * fk[j] * R[j])
        if begin + length == documents.bounds[i + 1]:
            final[i] = state
    tensors = {"Q": Q, "K": K, "rq": rq, "rk": rk, "fq": fq, "fk": fk, "beta": beta, "c": c, "keep": keep}
    tensors |= {"D": D, "G": G, "P": P, "M": M, "S": S, "R": R, "o": _tokens(O, chunks), "final": final}
    return tensors | {"chunks": chunks, "group": group}


def backward(x: dict[str, Tensor], a, A_log, dt_bias, documents, do, dfinal) -> dict[str, Tensor]:
    """The gradients and what leads to them, from `forward`'s tensors."""
    chunks, group, dk = x["chunks"], x["group"], x["K"].shape[-1]
    Q, K, D, G, P, M, S, R = (x[name] for name in ("Q", "K", "D", "G", "P", "M", "S", "R"))
    fq, fk, rq, rk, c, beta, keep = (x[name] for name in ("fq", "fk", "rq", "rk", "c", "beta", "keep"))
    dO, ec, rest = _rows(do, chunks), c.exp(), (c[..., -1:, :] - c).exp()
    dS, dV, dinitial = torch.empty_like(S), torch.empty_like(R), torch.empty_like(dfinal)  # dS: of the end state
    for j, (begin, length, i) in reversed(list(enumerate(chunks))):
        if begin + length == documents.bounds[i + 1]:
            state = dfinal[i]
        dS[j] = state
        dR = P[j].mT @ dO[j] + rest[j] * fk[j] * (K[j] @ state)
        dV[j] = beta[j] * (M[j].mT @ dR)
        state = keep[j] * state + Q[j].mT @ (ec[j] * fq[j] * dO[j]) - K[j].mT @ (ec[j] * fk[j] * dV[j])
        if begin == documents.bounds[i]:
            dinitial[i] = state
    dP, Z = dO @ R.mT, dV @ R.mT
    X_P, dP, N = dP * P, dP * D, -(Z * D).tril(-1)  # the gradients of P, of P without its decay, and of G
    read, write, erase = ec * (dO @ S.mT), rest * (R @ dS.mT), ec * (dV @ S.mT)
    dqn = dk**-0.5 * (read + (dP * fk.mT) @ K)
    dkn = write - erase + (dP.mT * fq.mT) @ Q + ((N + N.mT) * fk.mT) @ K
    X = (X_P + N * G).tril(-1)
    rho = (fq * Q * read).sum(-1) - (fk * K * erase).sum(-1)
    om = (fk * K * write).sum(-1)
    dc = rho + X.sum(-1) - X.sum(-2)
    # The sum of om over s < t. Not cumsum - om: the last row's om is O(1) where all others are decayed to nothing.
    om_before = torch.nn.functional.pad(om, (1, -1)).cumsum(-1)
    dg = dc.flip(-1).cumsum(-1).flip(-1) + om_before + keep[..., 0] * (S * dS).sum((-1, -2))[..., None]
    dqn, dkn = dqn.unflatten(1, (-1, group)).sum(2), dkn.unflatten(1, (-1, group)).sum(2)

    def through_norm(dn, x, r):
        return r * (dn - r * r * x * (x * dn).sum(-1, keepdim=True))

    return {
        "dS": dS,
        "dV": dV,
        "dq": _tokens(through_norm(dqn, Q[:, ::group], rq[:, ::group]), chunks),
        "dk": _tokens(through_norm(dkn, K[:, ::group], rk[:, ::group]), chunks),
        "dv": _tokens(dV, chunks),
        "da": -_tokens(dg, chunks) * A_log.exp() * (a + dt_bias).sigmoid(),
        "db": _tokens((1 - beta[..., 0]) / beta[..., 0].clamp_min(1e-30) * Z.diagonal(dim1=-2, dim2=-1), chunks),
        "dinitial_state": dinitial,
    }
