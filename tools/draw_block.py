"""Draws docs/block.svg: one block of the model, GEMMs and fused kernels, and where rank-1 LoRA rides along.

    python tools/draw_block.py
"""

from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "docs" / "block.svg"
KERNEL, GEMM, CORE, RED = "#dbeafe", "#fde68a", "#dcfce7", "#b91c1c"
WIDTH, ROW, BOX_W, BOX_H, LEFT = 1000, 78, 340, 52, (70, 550)

ATTENTION = [
    (KERNEL, "residual + RMSNorm", "h += y + s u Bᵀ;  x = norm(h);  u = x Aᵀ for q, k, v"),
    (GEMM, "q | gate | k | v", "one frozen GEMM"),
    (KERNEL, "q/k norm + RoPE", "adds s u Bᵀ to q, gate, k, v"),
    (CORE, "causal attention", "per document, grouped heads, head size 256"),
    (KERNEL, "output gate", "x = o · σ(gate);  u = x Aᵀ for o"),
    (GEMM, "o_proj", "its s u Bᵀ stays pending"),
]
DELTA = [
    (KERNEL, "residual + RMSNorm", "h += y + s u Bᵀ;  x = norm(h)"),
    (GEMM, "q k v | z | b | a", "one frozen GEMM"),
    (KERNEL, "causal convolution + SiLU", "4 taps, restarts at every document"),
    (CORE, "gated delta rule", "l2 norms, β and decay inside; chunks of 64"),
    (KERNEL, "gated RMSNorm", "x = norm(o) · w · silu(z)"),
    (GEMM, "out_proj", "pending (no adapter in the paper's recipe)"),
]
MLP = [
    (KERNEL, "residual + RMSNorm", "h += y + s u Bᵀ;  x = norm(h);  u = x Aᵀ for gate, up"),
    (GEMM, "gate | up", "one frozen GEMM"),
    (KERNEL, "SwiGLU", "adds s u Bᵀ;  x = silu(g) · p;  u = x Aᵀ for down"),
    (GEMM, "down_proj", "its s u Bᵀ stays pending"),
]
COLUMNS = (("48 blocks: gated delta net", DELTA), ("16 blocks: gated attention", ATTENTION))


def box(x: int, y: int, fill: str, title: str, caption: str) -> str:
    middle = x + BOX_W / 2
    return (
        f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="8" fill="{fill}" stroke="#334155"/>'
        f'<text x="{middle}" y="{y + 22}" text-anchor="middle" font-weight="600">{title}</text>'
        f'<text x="{middle}" y="{y + 41}" text-anchor="middle" font-size="12" fill="#334155">{caption}</text>'
    )


def arrow(x: float, y1: float, y2: float) -> str:
    return f'<line x1="{x}" y1="{y1}" x2="{x}" y2="{y2}" stroke="#334155" marker-end="url(#tip)"/>'


def column(x: int, name: str, mixer: list) -> str:
    middle, y = x + BOX_W / 2, 70
    parts = [f'<text x="{middle}" y="36" text-anchor="middle" font-size="17" font-weight="700">{name}</text>']
    parts.append(arrow(middle, 46, y - 2))
    rows = mixer + MLP
    for i, row in enumerate(rows):
        parts.append(box(x, y, *row))
        parts.append(arrow(middle, y + BOX_H, y + ROW - 2 if i + 1 < len(rows) else y + ROW + 4))
        y += ROW
    # The residual stream runs beside the boxes; the norms read and write it.
    lane = x - 22
    parts.append(f'<text x="{lane - 4}" y="40" fill="{RED}" font-size="14" font-weight="600">h</text>')
    parts.append(f'<path d="M {lane} 46 V {y + 4}" stroke="{RED}" stroke-width="2" marker-end="url(#red)"/>')
    for norm in (0, len(mixer)):
        parts.append(f'<path d="M {lane} {70 + norm * ROW + BOX_H / 2} H {x}" stroke="{RED}" stroke-width="2"/>')
    return "".join(parts)


def marker(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" markerWidth="9" markerHeight="9" refX="7" refY="3.5" orient="auto">'
        f'<path d="M0,0 L8,3.5 L0,7 z" fill="{colour}"/></marker>'
    )


def draw() -> str:
    height = 70 + 10 * ROW + 90
    legend_y = height - 48
    legend = "".join(
        f'<rect x="{70 + i * 250}" y="{legend_y}" width="18" height="18" rx="4" fill="{fill}" stroke="#334155"/>'
        f'<text x="{96 + i * 250}" y="{legend_y + 14}" font-size="13">{text}</text>'
        for i, (fill, text) in enumerate(
            ((KERNEL, "fused elementwise kernel"), (GEMM, "frozen GEMM (cuBLAS)"), (CORE, "mixer core (Triton)"))
        )
    )
    note = f'<text x="820" y="{legend_y + 14}" font-size="13" fill="{RED}">h: residual stream</text>'
    body = "".join(column(x, *content) for x, content in zip(LEFT, COLUMNS, strict=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="15">'
        f'<defs>{marker("tip", "#334155")}{marker("red", RED)}</defs>'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{body}{legend}{note}</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(OUT)
