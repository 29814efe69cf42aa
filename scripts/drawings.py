"""Every drawing of the book, written to nbs/images/*.svg: run again after a change; a test holds that it leaves no diff.

One helper per kind of mark; each drawing is a function that makes its marks, with its title and description in its docstring.
Left to right is the way the numbers flow. In labels `A_1` and `w_{down}` become subscripts, a line break stays one.
"""

import re
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "nbs" / "images"
INK = "#222222"
STROKE = {
    "A": "#0072B2",
    "B": "#D55E00",
    "router": "#009E73",
    "frozen": "#8A8A8A",
    "loss": "#A8457C",
    "plain": "#444444",
}
FILL = {"A": "#D6E9F5", "B": "#FBE3D3", "router": "#D3EEE5", "frozen": "#ECECEC", "loss": "#F6E1EC", "plain": "#FFFFFF"}
SUB = re.compile(r"_(?:\{([^}]*)\}|([A-Za-z0-9]))")
DRAWINGS = {}  # file name -> (function, width, height)
MARKS = []  # of the drawing that is being made


def tag(name, inner=None, **attributes):
    "An SVG element; attributes that are None are left out, `_` in a name is a hyphen."
    given = {key.replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = name + "".join(f' {k}="{v:g}"' if isinstance(v, float) else f' {k}="{v}"' for k, v in given.items())
    return f"<{head}/>" if inner is None else f"<{head}>{inner}</{name}>"


def mark(name, inner=None, **attributes):
    "Add an SVG element to the drawing."
    MARKS.append(tag(name, inner, **attributes))


def shape(name, kind, **attributes):
    "Add a filled outline in a kind's colours."
    dash = attributes.pop("dash", False)
    more = {"stroke_dasharray": "5 4" if dash else None}
    mark(name, **attributes, fill=FILL[kind], stroke=STROKE[kind], stroke_width=1.6, **more)


def text(x, y, label, size=13, kind=None, anchor="middle", bold=False, mono=False):
    "Centred lines of text; `_` begins a subscript unless the text is code (mono)."
    lines, step = label.split("\n"), size * 1.3
    down, up, small = (round(size * f, 1) for f in (0.25, -0.25, 0.75))
    lowered = lambda m: tag("tspan", m[1] or m[2], dy=down, font_size=small) + tag("tspan", "&#8203;", dy=up)
    looks = {"font_size": size, "text_anchor": anchor, "fill": STROKE[kind] if kind else INK}
    looks |= {"font_weight": "bold" if bold else None, "font_family": "monospace" if mono else None}
    for i, line in enumerate(map(escape, lines)):
        top = round(y + (i - (len(lines) - 1) / 2) * step + size * 0.35, 1)
        mark("text", line if mono else SUB.sub(lowered, line), x=x, y=top, **looks)


def heading(x, y, label, size=13):
    "Bold text that begins at x."
    text(x, y, label, size, anchor="start", bold=True)


def box(x, y, w, h, label="", kind="plain", size=13, dash=False, mono=False, bold=False):
    "A rounded box around its centre (x, y)."
    shape("rect", kind, x=x - w / 2, y=y - h / 2, width=w, height=h, rx=5, dash=dash)
    if label:
        text(x, y, label, size, mono=mono, bold=bold)


def matrix(x, y, w, left, right, label="", kind="A", size=14):
    "A matrix as a trapezoid: as tall at its left as its input is wide, at its right as its output is."
    corners = (
        (x - w / 2, y - left / 2),
        (x + w / 2, y - right / 2),
        (x + w / 2, y + right / 2),
        (x - w / 2, y + left / 2),
    )
    shape("polygon", kind, points=" ".join(f"{x:g},{y:g}" for x, y in corners))
    text(x, y, label, size, bold=True)


def vector(x, y, h, label="", kind="plain", below="", w=14):
    "A vector as an upright bar, its name above and its size below."
    box(x, y, w, h, kind=kind)
    text(x, y - h / 2 - 12, label, 14, bold=True)
    if below:
        text(x, y + h / 2 + 12, below, 11, "plain")


def arrow(*points, kind="plain", dash=False, head=True, width=1.6):
    "A line through the points with an arrow head at the last."
    path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
    looks = {"stroke_dasharray": "5 4" if dash else None, "marker_end": f"url(#head-{kind})" if head else None}
    mark("path", d=path, fill="none", stroke=STROKE[kind], stroke_width=width, **looks)


def plus(x, y, sign="+"):
    "Where branches are added."
    mark("circle", cx=x, cy=y, r=11, fill="#fff", stroke=INK, stroke_width=1.6)
    text(x, y, sign, 16)


def bars(x, y, heights, kind="router", w=9, scale=40):
    "Weights as a small bar chart standing on y, centred at x."
    left = x - (len(heights) * (w + 3) - 3) / 2
    for i, v in enumerate(heights):
        place = {"x": f"{left + i * (w + 3):g}", "y": f"{y - v * scale:.1f}"}
        mark("rect", **place, width=w, height=f"{v * scale:.1f}", fill=STROKE[kind])
    arrow((left - 4, y), (left + len(heights) * (w + 3) + 1, y), head=False, width=1)


def panel(x, y, w, h, title):
    "A light frame with a heading."
    mark("rect", x=x, y=y, width=w, height=h, rx=10, fill="#FAFAFA", stroke="#D8D8D8")
    heading(x + 14, y + 18, title, 14)


def drawing(name, width, height):
    "Register a function as the drawing nbs/images/NAME.svg."

    def register(f):
        DRAWINGS[name] = (f, width, height)
        return f

    return register


def svg(name):
    "The whole file of one drawing."
    make, w, h = DRAWINGS[name]
    title, desc = (" ".join(part.split()) for part in make.__doc__.split("\n", 1))
    MARKS.clear()
    make()
    view = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse"'
    head = '<marker id="head-{}" ' + view + '><path d="M0 0.5L8 4L0 7.5z" fill="{}"/></marker>'
    size = f'viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-labelledby="title desc"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif">'
    about = f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape(desc)}</desc>'
    defs = f"<defs>{''.join(head.format(*pair) for pair in STROKE.items())}</defs>"
    ground = f'<rect width="{w}" height="{h}" rx="12" fill="#FFFFFF"/>'
    return "\n".join([opening, about, defs, ground, *MARKS, "</svg>\n"])


@drawing("overview", 860, 400)
def overview():
    """A D2MoRA layer
    A token x goes through the frozen matrix W and, beside it, through three A's whose outputs a first router mixes
    into z, then through several B's whose outputs a second router, reading z, mixes into the update that is added
    to W x."""
    heading(20, 24, "One adapted layer: M experts down, N experts up, a router for each side", 15)
    vector(50, 215, 150, "x", below="d_{in}")
    arrow((57, 160), (100, 160), (100, 75), (330, 75))
    box(430, 75, 200, 46, "W, frozen", "frozen", 15)
    arrow((530, 75), (795, 75), (795, 202))
    for i, y in enumerate((150, 215, 280)):
        arrow((57, 215), (150, y), kind="A")
        matrix(185, y, 70, 54, 22, f"A_{i + 1}", "A")
        arrow((220, y), (331, 213), kind="A")
    arrow((57, 270), (90, 270), (90, 350), (128, 350), kind="router")
    box(185, 350, 112, 34, "router R_{down}", "router")
    arrow((241, 350), (272, 350), kind="router")
    bars(296, 362, (0.9, 0.35, 0.6))
    text(296, 378, "w_{down}", 13, "router")
    arrow((300, 318), (337, 232), kind="router")
    plus(342, 215, "Σ")
    arrow((353, 215), (386, 215), kind="A")
    vector(395, 215, 36, "z", below="r")
    for y, name in ((137, "B_1"), (193, "B_2"), (293, "B_N")):
        arrow((403, 215), (480, y), kind="B")
        matrix(520, y, 80, 20, 46, name, "B")
        arrow((560, y), (661, 213), kind="B")
    text(520, 242, "⋮", 20, "B", bold=True)
    arrow((395, 256), (395, 350), (448, 350), kind="router")
    box(505, 350, 112, 34, "router R_{up}", "router")
    arrow((561, 350), (592, 350), kind="router")
    bars(624, 362, (0.5, 0.9, 0.2, 0.7))
    text(624, 378, "w_{up}", 13, "router")
    arrow((630, 318), (667, 232), kind="router")
    plus(672, 215, "Σ")
    arrow((683, 215), (783, 215), kind="B")
    text(733, 199, "× α / r", 13)
    plus(795, 215)
    arrow((806, 215), (828, 215))
    vector(838, 215, 130, "y", below="d_{out}")


@drawing("00_tasks_row", 820, 250)
def tasks_row():
    """From a row to a score
    A row of a data file becomes a prompt; the model is asked; its answer word is compared with the row's answer."""
    panel(15, 15, 225, 215, "a row of the file")
    text(28, 56, "instruction", 11, "plain", "start", True)
    text(28, 92, "Which is the answer?\nanswer1: a stone\nanswer2: a river", 12, anchor="start", mono=True)
    text(28, 136, "output", 11, "plain", "start", True)
    text(28, 162, "the correct answer\nis answer2", 12, anchor="start", mono=True)
    text(28, 190, "answer", 11, "plain", "start", True)
    text(28, 207, "answer2", 12, anchor="start", mono=True)
    arrow((240, 90), (292, 90))
    text(266, 76, "style", 11)
    box(365, 90, 140, 60, "prompt\n(ends before the\nanswer)", size=12)
    arrow((435, 90), (482, 90))
    box(540, 90, 110, 50, "language\nmodel", "frozen")
    arrow((595, 90), (642, 90))
    box(720, 90, 150, 62, "which answer word\nis the most likely,\nor is written?", size=12)
    arrow((720, 121), (720, 172))
    box(720, 194, 150, 40, "equal: 1, else 0", "loss", 13)
    arrow((240, 200), (640, 200))
    text(430, 187, "the row's own answer", 12)
    text(430, 216, "never shown to the model when it is graded", 11, "plain")


@drawing("00_tasks_world", 820, 300)
def tasks_world():
    """The toy world and its split by fact
    Facts about invented things are all told to the base model. Each fact is asked for either in training questions
    or in test questions of the eight tasks, never in both."""
    panel(15, 15, 215, 270, "the world: facts")
    facts = [("A", 74), ("A", 118), ("A", 162), ("B", 206), ("B", 250)]
    for (kind, y), (a, b) in zip(
        facts, (("zib", "red"), ("zib", "lake"), ("mok", "seeds"), ("mok", "blue"), ("dax", "wood"))
    ):
        box(68, y, 62, 28, a, kind)
        arrow((99, y), (148, y))
        box(180, y, 62, 28, b, kind)
    arrow((230, 60), (300, 60))
    box(400, 60, 200, 50, "every fact, as sentences", "plain")
    arrow((500, 60), (590, 60))
    box(690, 60, 190, 50, "base model\nknows the facts", "frozen")
    arrow((230, 140), (300, 140), kind="A")
    box(400, 140, 200, 54, "training questions\nof all eight tasks", "A")
    arrow((500, 140), (590, 140), kind="A")
    box(690, 140, 190, 50, "adapter learns\nthe tasks' form", "router")
    arrow((230, 230), (300, 230), kind="B")
    box(400, 230, 200, 54, "test questions\nof all eight tasks", "B")
    arrow((500, 230), (590, 230), kind="B")
    box(690, 230, 190, 50, "graded: can it use facts\nit was never asked for?", "loss", 12)
    arrow((690, 85), (690, 113), kind="frozen")
    arrow((690, 165), (690, 203), kind="router")
    arrow((300, 185), (500, 185), dash=True, head=False)
    text(515, 185, "no fact on both sides", 12, anchor="start", bold=True)


@drawing("01_lora", 780, 300)
def lora():
    """LoRA
    The input x goes through the frozen matrix W and, beside it, through A down to rank r and through B up again;
    the scaled result is added."""
    vector(60, 165, 150, "x", below="d_{in}")
    arrow((67, 125), (130, 125), (130, 75), (255, 75))
    box(385, 75, 260, 60, "W: d_{out} × d_{in}, frozen", "frozen", 15)
    arrow((515, 75), (680, 75), (680, 193))
    arrow((67, 205), (150, 205), kind="A")
    matrix(205, 205, 110, 110, 30, "A", "A", 17)
    arrow((260, 205), (316, 205), kind="A")
    vector(325, 205, 34, "z", below="r numbers")
    arrow((333, 205), (385, 205), kind="B")
    matrix(440, 205, 110, 30, 110, "B", "B", 17)
    arrow((495, 205), (668, 205), kind="B")
    text(582, 189, "× α / r", 14)
    plus(680, 205)
    arrow((691, 205), (724, 205))
    vector(733, 205, 120, "y", below="d_{out}")
    text(205, 277, "A: random at the start", 12, "A")
    text(450, 277, "B: zero at the start, so y = W x", 12, "B")


@drawing("02_shared_a", 860, 330)
def shared_a():
    """One-to-one and one-to-many
    Left: three pairs of A and B, a router that reads x weighs the pairs. Right: one shared A and three B's, a
    router that reads x weighs the B's."""
    for left, title, shared in ((15, "one-to-one: M = N pairs", False), (440, "one-to-many: one A, N B's", True)):
        panel(left, 15, 405, 300, title)
        vector(left + 32, 150, 120, "x")
        if shared:
            arrow((left + 39, 150), (left + 95, 150), kind="A")
            matrix(left + 135, 150, 80, 80, 26, "A", "A", 16)
            arrow((left + 175, 150), (left + 207, 150), kind="A")
            vector(left + 214, 150, 30, "z", w=11)
        for i, y in enumerate((80, 150, 220)):
            if not shared:
                arrow((left + 39, 150), (left + 85, y), kind="A")
                matrix(left + 120, y, 70, 54, 20, f"A_{i + 1}", "A")
                arrow((left + 155, y), (left + 205, y), kind="A")
            if shared:
                arrow((left + 220, 150), (left + 245, y), kind="B")
            matrix(left + (280 if shared else 242), y, 70, 20, 54, f"B_{i + 1}", "B")
            arrow((left + (315 if shared else 277), y), (left + 348, 150 + (y - 150) * 0.12), kind="B")
        plus(left + 360, 150, "Σ")
        arrow((left + 371, 150), (left + 396, 150))
        arrow((left + 32, 213), (left + 32, 280), (left + 75, 280), kind="router")
        box(left + 140, 280, 130, 34, "router reads x", "router")
        arrow((left + 205, 280), (left + 238, 280), kind="router")
        bars(left + 262, 294, (0.4, 0.9, 0.6), scale=34)
        arrow((left + 286, 280), (left + 360, 280), (left + 360, 163), kind="router")
        text(left + 313, 266, "w(x)", 13, "router")


@drawing("03_many_to_many", 860, 340)
def many_to_many():
    """Many-to-many
    Left: every A meets every B, which makes M times N pairs. Right: the same sum computed through one mixture z,
    with M projections down and N up."""
    downs, ups = ((95, 165, 235), (75, 135, 195, 255))
    panel(15, 15, 405, 310, "what it means: every A meets every B")
    panel(440, 15, 405, 310, "what is computed: one z between them")
    vector(45, 165, 120, "x")
    vector(470, 165, 120, "x")
    for i, y in enumerate(downs):
        arrow((52, 165), (85, y), kind="A")
        matrix(120, y, 70, 54, 20, f"A_{i + 1}", "A")
        arrow((477, 165), (510, y), kind="A")
        matrix(545, y, 70, 54, 20, f"A_{i + 1}", "A")
        for u in ups:
            arrow((157, y), (283, u), head=False, width=1.1)
        arrow((580, y), (623, 165 + (y - 165) * 0.12), kind="A")
    plus(634, 165, "Σ")
    arrow((645, 165), (666, 165), kind="A")
    vector(674, 165, 32, "z", w=11)
    for j, u in enumerate(ups):
        matrix(320, u, 70, 20, 46, f"B_{j + 1}", "B")
        arrow((680, 165), (708, u), kind="B")
        matrix(740, u, 62, 20, 46, f"B_{j + 1}", "B")
        arrow((771, u), (806, 165 + (u - 165) * 0.12), kind="B")
        arrow((355, u), (386, 165 + (u - 165) * 0.12), kind="B")
    plus(397, 165, "Σ")
    plus(818, 165, "Σ")
    text(217, 302, "3 × 4 = 12 pairs, each weighed w_i · w_j", 13)
    text(642, 302, "3 + 4 = 7 products, the same numbers", 13)


@drawing("04_routers", 820, 330)
def routers():
    """The two routers
    A first router reads x and gives M weights for the A's; a second reads the mixed z and gives N weights for the
    B's. Each is one matrix without bias followed by a softmax."""
    for top, name, reads, size, weights, kind, n in (
        (80, "down", "x", "d_{in}", (0.55, 0.15, 0.3), "A", "M"),
        (235, "up", "z", "r", (0.1, 0.45, 0.15, 0.3), "B", "N"),
    ):
        vector(55, top, 100 if name == "down" else 40, reads, below=size)
        arrow((63, top), (135, top), kind="router")
        matrix(195, top, 120, 96 if name == "down" else 40, 30, f"R_{{{name}}}", "router", 15)
        arrow((255, top), (300, top), kind="router")
        box(350, top, 100, 40, "softmax", "router", 14)
        arrow((400, top), (452, top), kind="router")
        bars(500, top + 30, weights, scale=100, w=14)
        text(500, top + 45, f"w_{{{name}}}: {n} weights, sum 1", 12, "router")
        arrow((560, top), (620, top), kind=kind)
    text(195, 146, "M × d_{in}", 11, "plain")
    text(195, 277, "N × r", 11, "plain")
    box(715, 80, 180, 66, "mix the A's\nz = Σ w_{down,i} · A_i x", "A", 14)
    box(715, 235, 180, 66, "mix the B's\nΣ w_{up,j} · B_j z", "B", 14)
    arrow((715, 113), (715, 164), (22, 164), (22, 235), (46, 235), kind="A")
    text(420, 176, "z is what the second router reads", 12, "A")
    text(410, 312, "each token has its own weights; the softmax is taken in float32", 12, "plain")


@drawing("05_orthogonality_angle", 820, 240)
def orthogonality_angle():
    """Copies and orthogonal experts
    Two experts as arrows: copies lie on each other and score one, orthogonal experts stand at a right angle and
    score zero."""
    for left, title, score, first, second, below in (
        (135, "copies", "|cos| ≈ 1", (120, -74), (112, -62), (8, 16)),
        (405, "related", "|cos| ≈ 0.8", (120, -62), (58, -122), (2, -12)),
        (690, "orthogonal", "|cos| = 0", (104, -60), (-60, -104), (2, -12)),
    ):
        panel(15 + 270 * (left // 250), 15, 250, 210, title)
        for (x, y), (dx, dy), name in ((first, (2, -12), "A_1"), (second, below, "A_2")):
            arrow((left - 15, 172), (left - 15 + x, 172 + y), kind="A", width=3)
            text(left - 15 + x + dx, 172 + y + dy, name, 14, "A", bold=True)
        text(140 + 270 * (left // 250), 206, score, 16, "loss", bold=True)


@drawing("05_orthogonality_step", 820, 185)
def orthogonality_step():
    """When the orthogonality gradient is added
    Several micro-batches accumulate gradients of the language-model loss; they are clipped; then lambda times the
    gradient of the orthogonality loss is added once; then the optimizer steps."""
    text(20, 26, "one optimizer step", 15, anchor="start", bold=True)
    for g in range(4):
        box(78 + g * 100, 80, 86, 50, f"micro-batch\n{g + 1}", size=12)
        arrow((78 + g * 100, 105), (78 + g * 100, 140), head=False)
    arrow((78, 140), (452, 140))
    text(228, 157, "gradients of the language-model loss add up", 12)
    box(492, 140, 74, 44, "clip", "plain", 14)
    arrow((529, 140), (562, 140), kind="loss")
    box(628, 140, 126, 44, "+ λ ∇ loss_{orth}", "loss", 14)
    arrow((691, 140), (722, 140))
    box(762, 140, 74, 44, "step", "router", 14)
    text(628, 94, "once, however many\nmicro-batches or processes", 12, "loss")
    arrow((628, 110), (628, 116), kind="loss", head=False)


@drawing("06_lean", 860, 350)
def lean():
    """What training must keep for the backward pass
    The loop keeps a dropped-out copy of x for each A and a full-width product for each B. Flattened, one
    dropped-out x and narrow vectors are kept. Lean keeps x itself, which q, k and v share, and one bit per number."""
    for left, title in ((15, "loop over experts"), (300, "flattened"), (585, "lean")):
        panel(left, 15, 260, 320, title)
    for left in (45, 330, 615):
        box(left, 112, 30, 120, "x", "frozen", 14, dash=True)
    for i in range(3):
        box(95 + i * 44, 112, 34, 120, f"drop\n{i + 1}", "A", 11)
    text(145, 196, "a dropped-out x for each A:\n(tokens × d_{in}) × M", 12, "A")
    for j in range(4):
        box(50 + j * 44, 258, 34, 70, f"B_{j + 1}z", "B", 12)
    text(232, 258, "…", 18)
    text(145, 312, "a full-width product for each B:\n(tokens × d_{out}) × N", 12, "B")
    box(380, 112, 34, 120, "drop", "A", 11)
    box(420, 112, 14, 120, "", "A")
    text(430, 196, "one dropped-out x and its mask:\ntokens × d_{in}", 12, "A")
    box(345, 258, 22, 70, "z", "plain", 13)
    box(390, 258, 50, 70, "w⊗z", "plain", 13)
    text(430, 312, "only narrow ones:\nr and N·r numbers a token", 12)
    box(655, 112, 5, 120, "", "A")
    text(755, 92, "the mask, one bit a number;\ndropout is done again\nin the backward pass", 12, "A")
    text(715, 196, "dashed: the routers read x anyway,\nand q, k and v share it", 12, "plain")
    box(630, 258, 22, 70, "z", "plain", 13)
    box(675, 258, 50, 70, "w⊗z", "plain", 13)
    text(715, 312, "only narrow ones,\nas before", 12)


@drawing("07_tuner", 820, 350)
def tuner():
    """Putting D2MoRA into a model
    PEFT walks through a model that it did not write and wraps each named linear layer; the other layers stay as
    they are."""
    panel(15, 15, 220, 320, "any model")
    panel(430, 15, 375, 320, "the same model, adapted")
    for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "mlp")):
        y = 78 + i * 55
        box(125, y, 150, 38, name, "frozen", 14, mono=True)
        if i > 2:
            box(520, y, 150, 38, name, "frozen", 14, mono=True)
            text(610, y, "untouched", 12, "plain", "start")
        else:
            box(610, y, 330, 48, "", "plain")
            box(520, y, 130, 34, name, "frozen", 14, mono=True)
            text(594, y, "+", 16)
            matrix(624, y, 34, 34, 14, "A", "A", 12)
            matrix(664, y, 34, 14, 34, "B", "B", 12)
            box(724, y, 64, 28, "routers", "router", 12)
    arrow((245, 175), (420, 175), width=2.4)
    text(332, 120, "get_peft_model\n(model, config)", 13, mono=True)
    text(332, 215, "the config names\nthe layers to wrap", 12)
    text(332, 262, "W frozen,\nonly A's, B's and\nrouters are trained", 12, "router")


@drawing("07b_published", 820, 300)
def published():
    """From a published checkpoint to ours
    Each published expert is a matrix of its own with a number; the A's are stacked as they are, the B's are
    transposed and stacked, the two routers keep their numbers; M, N and r follow from the shapes."""
    panel(15, 15, 290, 270, "a published checkpoint")
    panel(515, 15, 290, 270, "D2MoRA adapter")
    groups = (
        (("lora_A.0", "lora_A.1", "lora_A.2"), "d2mora_A.weight\n(M·r, d_in)", "A", 85, "stack"),
        (("lora_B.0", "…", "lora_B.7"), "d2mora_B.weight\n(N·r, d_out)", "B", 170, "transpose, stack"),
        (("lora_route1", "lora_route2"), "d2mora_router_down.weight\nd2mora_router_up.weight", "router", 245, "rename"),
    )
    for names, ours, kind, y, how in groups:
        first, step, w = (62, 92, 84) if len(names) == 3 else (86, 138, 126)
        for k, name in enumerate(names):
            box(first + k * step, y, w, 42, name, kind, 12, mono=True)
        arrow((312, y), (522, y))
        text(412, y - 14, how, 13)
        box(660, y, 230, 50, ours, kind, 13, mono=True)
    text(412, 44, "M, N, r: from the shapes\nlora_alpha: must be given", 11, mono=True)


@drawing("08_data", 860, 280)
def data():
    """From files to rows
    Rows come from the toy world, from a folder with one folder a task, or from one mixed file whose rows are told
    apart by the answers they offer; each row is checked by itself, then all are counted."""
    for i, (label, kind) in enumerate(
        (("toy, toy-hard", "router"), ("<task>/train.json", "frozen"), ("commonsense_170k.json", "frozen"))
    ):
        y = 65 + i * 75
        box(115, y, 190, 44, label, kind, 13, mono=True)
        arrow((213, y), (262, 140 + (y - 140) * 0.4))
    text(115, 258, "one mixed file: the answers\non offer tell the task", 12)
    box(350, 140, 160, 110, "each row:\nfour texts?\nan offered answer?\nfound by grading?", "plain", 13)
    arrow((432, 140), (482, 140))
    box(560, 140, 140, 70, "all rows:\nrepeated?\nin the test set?", "plain", 13)
    arrow((632, 140), (680, 140))
    box(765, 140, 150, 70, "rows and counts", "B", 14, bold=True)
    arrow((350, 197), (350, 226), kind="loss")
    box(455, 248, 370, 38, "train.json: row 1: field 'output' is missing", "loss", 13, mono=True)


@drawing("08a_batches", 860, 390)
def batches():
    """From text to a batch
    A prompt and its answer become tokens; a mask says which are target tokens; rows are padded to one length. Too
    long a row is handled in one of three ways."""

    def strip(x, y, kinds, w=20, h=24):
        for i, kind in enumerate(kinds):
            box(x + i * (w + 3), y, w, h, "", kind, dash=kind == "plain")

    heading(25, 40, "text")
    box(255, 40, 290, 32, "Which is right? answer1 … answer2 …", "frozen", 13, mono=True)
    box(535, 40, 245, 32, "the correct answer is answer2", "B", 12, mono=True)
    text(690, 40, "prompt + answer", 12, "plain", "start")
    arrow((400, 58), (400, 78))
    heading(25, 98, "tokens")
    strip(122, 98, ["frozen"] * 13)
    strip(424, 98, ["B"] * 8 + ["loss"])
    text(690, 98, "last: end of sequence", 12, "plain", "start")
    heading(25, 132, "graded?")
    text(260, 132, "no (yes, when train_on_inputs)", 12, "plain", mono=True)
    text(520, 132, "yes", 13, "B", bold=True)
    heading(25, 184, "batch")
    for i, (pad, prompt, answer) in enumerate(((0, 13, 9), (6, 9, 7), (3, 11, 8))):
        strip(122, 166 + i * 27, ["plain"] * pad + ["frozen"] * prompt + ["B"] * (answer - 1) + ["loss"], h=20)
    text(690, 193, "dashed: padding,\nnever read, never graded", 12, "plain", "start")
    mark("line", x1=20, x2=840, y1=252, y2=252, stroke="#D8D8D8")
    heading(25, 274, "a row longer than cutoff")
    for i, (mode, kinds, say) in enumerate(
        (
            ("prompt", ["frozen"] * 9 + ["B"] * 8 + ["loss"], "the prompt is shortened, the answer stays (default)"),
            ("skip", [], "the row is left out, and counted"),
            ("published", ["frozen"] * 13 + ["B"] * 5, "the end is cut, and the answer with it"),
        )
    ):
        text(25, 304 + i * 30, mode, 13, anchor="start", mono=True)
        strip(122, 304 + i * 30, kinds, h=20)
        text(548, 304 + i * 30, say, 12, "plain", "start")
    mark("line", x1=532, x2=532, y1=288, y2=378, stroke=INK, stroke_dasharray="4 3")
    text(532, 278, "cutoff", 11)


@drawing("08b_trainer", 860, 250)
def step():
    """One training step
    A batch goes through the frozen model with its adapters; the loss on the target tokens is backpropagated into
    the adapters only; after all micro-batches the gradients are clipped, the orthogonality gradient is added, the
    optimizer and the schedule step."""
    box(80, 95, 110, 54, "micro-batch", "plain", 14)
    arrow((135, 95), (172, 95))
    box(275, 95, 200, 84, "", "frozen")
    text(275, 72, "frozen model", 14)
    matrix(235, 108, 40, 36, 16, "A", "A", 13)
    matrix(280, 108, 40, 16, 36, "B", "B", 13)
    box(334, 108, 56, 30, "routers", "router", 11)
    arrow((375, 95), (412, 95))
    box(490, 95, 150, 54, "language-model loss\non target tokens", "plain", 12)
    arrow((565, 95), (602, 95))
    box(690, 95, 170, 54, "backward: gradients\nof the adapters only", "plain", 12)
    arrow((690, 68), (690, 38), (80, 38), (80, 66), dash=True)
    text(385, 22, "repeat for each micro-batch (gradient accumulation)", 12)
    arrow((690, 122), (690, 200), (650, 200))
    text(760, 165, "all added up", 12)
    box(600, 200, 100, 48, "clip", "plain", 14)
    arrow((550, 200), (512, 200), kind="loss")
    box(435, 200, 150, 48, "+ λ ∇ loss_{orth}", "loss", 14)
    arrow((360, 200), (322, 200))
    box(245, 200, 150, 48, "AdamW step", "router", 14)
    arrow((170, 200), (142, 200))
    box(85, 200, 112, 48, "learning rate\nof the schedule", "plain", 12)
    arrow((80, 176), (80, 124), dash=True)
    text(92, 150, "next step", 12, anchor="start")


@drawing("08c_recipe", 860, 300)
def recipe():
    """From words to a model
    A recipe has four parts; each key and value is checked by the type that its library declares; the checked recipe
    becomes a base with a fresh adapter; a wrong word is answered in one line before anything is loaded."""
    panel(15, 15, 200, 270, "recipe (YAML)")
    parts = (
        ("base", "toy, a folder,\na hub name", "frozen"),
        ("adapter", "any PEFT\nconfiguration", "A"),
        ("data", "DataConfig\n(notebook 08)", "B"),
        ("training", "Training-\nArguments", "router"),
    )
    for i, (name, owner, kind) in enumerate(parts):
        y = 75 + i * 60
        box(115, y, 160, 40, f"{name}:", kind, 14, mono=True)
        arrow((198, y), (238, y))
        box(300, y, 116, 48, owner, kind, 12)
        arrow((362, y), (398, 150 + (y - 165) * 0.35))
    box(470, 150, 136, 90, "every key known?\nevery value\nof its type?", "plain", 13)
    text(470, 90, "load_recipe", 13, mono=True)
    arrow((540, 150), (578, 150))
    box(628, 150, 92, 52, "Recipe", "plain", 14, bold=True)
    arrow((676, 150), (714, 150))
    box(778, 150, 118, 70, "base with a\nfresh adapter", "A", 13)
    text(765, 100, "adapted_base", 13, mono=True)
    arrow((470, 197), (470, 238), kind="loss")
    box(580, 262, 380, 40, "learning_rat: did you mean learning_rate?", "loss", 13, mono=True)


@drawing("08e_resume", 860, 290)
def resume():
    """Killed and resumed
    Steps follow each other; a checkpoint is written at some steps; a kill leaves an incomplete one, which is
    left out on resume, and the run goes on from the last complete one through the same steps."""
    x = lambda step: 70 + step * 46
    text(20, 28, "killed at step 10", 14, anchor="start", bold=True)
    for step in range(1, 11):
        box(x(step), 70, 34, 30, str(step), "loss" if step == 10 else "plain", 13)
    text(x(11) - 8, 70, "killed", 14, "loss", anchor="start", bold=True)
    for step in (4, 8):
        arrow((x(step), 88), (x(step), 112))
        box(x(step), 130, 130, 32, f"checkpoint-{step}", "router", 13, mono=True)
    box(x(12) + 60, 130, 110, 32, "checkpoint-10", "plain", 13, dash=True, mono=True)
    text(x(12) + 122, 130, "incomplete:\nleft out on resume", 12, "plain", "start")
    text(20, 194, "resumed", 14, anchor="start", bold=True)
    arrow((x(8), 148), (x(8), 222), (x(9) - 22, 222), kind="router", width=2.2)
    for step in range(9, 17):
        box(x(step), 222, 34, 30, str(step), "A", 13)
    text(x(8) - 12, 200, "weights, optimizer, schedule,\nrandom states, log", 12, "router", anchor="end")
    text(x(12) + 20, 264, "the same steps with the same rows and masks: the same adapter to the last bit", 12, "A")


@drawing("10_likelihood", 860, 250)
def likelihood():
    """Every token is read once
    What all rows begin with is read once and kept; each row's own tokens are read behind it, all rows of a batch at
    once, padded on the left; its options follow, and only those of more than one token are read."""
    panel(15, 15, 250, 220, "all rows: once")
    panel(280, 15, 320, 220, "each row: in one batch")
    panel(615, 15, 230, 220, "each option")
    box(140, 125, 220, 48, "Below is an instruction …\nPlease choose the correct", "frozen", 12, mono=True)
    text(140, 170, "keys and values are kept,\nfor the next batch too", 12, "plain")
    for y, row, pad, word in (
        (80, "… a cat? … the correct answer is", 0, "answer"),
        (125, "… stone? … the correct answer is", 24, "true"),
        (170, "… it? … the correct answer is", 48, "answer"),
    ):
        left, right = (294, 588)
        arrow((252, 125), (left - 2, y), kind="frozen")
        if pad:
            box(left + pad / 2, y, pad, 30, "", "plain", dash=True)
        box((left + pad + right) / 2, y, right - left - pad, 30, row, "A", 12, mono=True)
        ends = [f"{word}{i}" for i in (1, 2, 3)] if word == "answer" else ["true", "false"]
        for i, end in enumerate(ends):
            arrow((right + 1, y), (640, y + (i - (len(ends) - 1) / 2) * 14), head=False, kind="B")
            text(646, y + (i - (len(ends) - 1) / 2) * 14, f"log p({end})", 12, "B", "start", mono=True)
    text(440, 208, "padding on the left, hidden by a mask", 12, "plain")


@drawing("10_evaluate", 860, 350)
def evaluate():
    """Two ways to grade
    Choice: the log-likelihood of each answer word after the prompt is summed and the largest wins; content does so
    with each option's own text. Generate: the model writes, and a regular expression looks for an answer word; no
    match counts as wrong and is reported; official writes with 4 beams."""
    title = "choice: which answer word does the model find most likely? (content: which option's own text?)"
    panel(15, 15, 830, 150, title)
    box(105, 98, 140, 54, "prompt + “the\ncorrect answer is”", "plain", 12)
    for i, (y, word, value, v) in enumerate(
        ((62, "answer1", "−4.1", 0.35), (98, "answer2", "−0.7", 0.95), (134, "answer3", "−3.2", 0.5))
    ):
        arrow((175, 98), (223, y))
        box(270, y, 90, 26, word, "B", 12, mono=True)
        arrow((315, y), (350, y))
        box(440, y, 170, 26, f"log p = {value}", "plain", 13)
        mark("rect", x=540, y=y - 7, width=f"{v * 90:.0f}", height=14, fill=STROKE["B" if i == 1 else "frozen"])
    heading(685, 98, "largest wins: answer2")
    panel(15, 180, 830, 155, "generate: what does it write? (official: the same with 4 beams and the published prompt)")
    box(90, 258, 110, 48, "prompt", "plain", 13)
    arrow((145, 258), (180, 258))
    box(235, 258, 100, 48, "model", "frozen", 14)
    arrow((285, 258), (320, 258))
    box(425, 258, 200, 48, "the correct answer is\nanswer2", "plain", 12, mono=True)
    arrow((525, 258), (562, 258))
    box(635, 258, 140, 48, "first match of\nanswer1|…|answer5", "router", 12, mono=True)
    arrow((705, 250), (728, 234))
    text(736, 230, "answer2", 13, anchor="start", mono=True)
    arrow((705, 268), (728, 288), kind="loss")
    text(736, 292, "no match: wrong,\nand counted", 12, "loss", "start")


@drawing("10c_grading", 860, 230)
def grading():
    """Graded rows outlive the process
    Each graded batch is appended to a part file at once; a killed process may leave a torn last line, which is
    dropped; the next call grades only what is missing, and the finished table is the same."""
    box(85, 75, 120, 52, "grade a batch", "A", 13)
    arrow((147, 75), (205, 75))
    panel(210, 20, 220, 190, "evaluation-….part-0.jsonl")
    for i, (name, right) in enumerate((("9f", "true"), ("3c", "false"), ("b1", "true"), ("07", "true"))):
        box(320, 62 + i * 27, 196, 22, f'{{"hash": "{name}…", "right": {right}', "frozen", 10, mono=True)
    box(266, 170, 88, 22, '{"hash": "e2', "loss", 10, dash=True, mono=True)
    text(318, 170, "torn: dropped", 12, "loss", "start")
    box(85, 170, 120, 44, "killed", "loss", 13)
    arrow((147, 170), (208, 170), kind="loss")
    arrow((432, 115), (475, 115))
    box(555, 115, 155, 70, "next call:\nthe rows that are\nmissing, no others", "router", 13)
    arrow((635, 115), (675, 115))
    box(760, 115, 165, 70, "the same table\nas without the kill", "B", 13)
    text(555, 185, "other weights, protocol or prompt:\nrefused, nothing overwritten", 12, "plain")


@drawing("12b_compare", 860, 330)
def compare():
    """A comparison
    One recipe is run with each method and each seed on the same data; each run is trained and graded; the table has
    mean and spread, and paired tests compare methods over seeds."""
    box(85, 150, 130, 76, "one recipe:\nsame base, data,\nsteps, parameters", "plain", 12)
    methods = (("LoRA", "frozen"), ("one-to-one", "A"), ("one-to-many", "B"), ("D2MoRA", "router"))
    for i, (name, kind) in enumerate(methods):
        y = 75 + i * 58
        arrow((150, 150), (188, y))
        box(245, y, 110, 36, name, kind, 13)
        for s in range(3):
            box(340 + s * 42, y, 36, 32, f"s{s}", kind, 12)
        arrow((445, y), (486, y))
    text(382, 32, "seeds 0, 1, 2:\neach is a whole run", 12)
    panel(490, 30, 165, 250, "mean ± std")
    panel(690, 30, 155, 250, "paired tests")
    for i, (mean, spread) in enumerate(((62, 14), (66, 22), (59, 12), (65, 18))):
        y = 75 + i * 58
        x = 500 + mean * 1.4
        arrow((x - spread, y), (x + spread, y), head=False)
        mark("circle", cx=x, cy=y, r=6, fill=STROKE[methods[i][1]])
    arrow((655, 155), (688, 155))
    text(767, 150, "the same test rows\nunder two methods:\nright / wrong,\n\nis the difference\nmore than chance?", 12)
    text(430, 308, "one seed proves nothing: the spread between seeds is part of the result", 12, "loss")


@drawing("08a_packed", 860, 300)
def data_packed():
    """Padded and packed
    Three rows of a batch, once padded to the longest, once end to end in one sequence; positions start again at 0
    with each row, and each token sees only the tokens of its own row before it."""
    rows, kinds = ((4, 9, 6), ("A", "B", "router"))
    heading(120, 30, "padded: 27 tokens computed, 19 useful")
    heading(490, 30, "packed: 19 tokens")
    for i, (n, kind) in enumerate(zip(rows, kinds)):
        for j in range(9):
            box(135 + j * 25, 70 + i * 32, 21, 21, str(j) if j < n else "", kind if j < n else "plain", 11, dash=j >= n)
    text(60, 102, "position", 12)
    arrow((380, 102), (435, 102))
    starts = [sum(rows[:i]) for i in range(3)]
    for n, start, kind in zip(rows, starts, kinds):
        for j in range(n):
            box(455 + (start + j) * 19.5, 70, 17, 21, str(j), kind, 10)
    x, y, c = (540, 105, 9)
    mark("rect", x=x, y=y, width=19 * c, height=19 * c, fill="#FFFFFF", stroke="#999999")
    for n, start, kind in zip(rows, starts, kinds):
        for j in range(n):
            place = {"x": x + start * c, "y": y + (start + j) * c, "width": (j + 1) * c, "height": c}
            mark("rect", **place, fill=STROKE[kind], opacity="0.55")
    text(x - 12, y + 85, "token", 12, anchor="end")
    text(x + 86, y + 184, "sees", 12)
    text(120, 215, "dashed: padding, computed for nothing", 12, anchor="start")


@drawing("12d_neighbours", 860, 420)
def neighbours():
    """Where the neighbours differ
    Four panels. One: of four pairs of A and B the strongest two are asked. Two: of eight single ranks the strongest
    three are asked. Three: one A, and a router that reads its low-rank vector weighs the B's. Four: the weights of
    two rows are averaged, and both rows get the mean."""
    titles = ("top-k: the strongest pairs only", "each rank is an expert")
    titles += ("the router reads z, not x", "mean over the batch: it leaks")
    for k, title in enumerate(titles):
        panel(15 + 425 * (k % 2), 15 + 200 * (k // 2), 405, 185, title)
    for i, (y, w) in enumerate(zip((64, 99, 134, 169), (0.5, 0.06, 0.38, 0.06))):
        down, up, dash = ("A", "B", False) if w > 0.2 else ("frozen", "frozen", True)
        arrow((48, 116), (90, y), kind=down, dash=dash)
        matrix(120, y, 60, 30, 14, f"A_{i + 1}", down, 12)
        arrow((150, y), (190, y), kind=down, dash=dash)
        matrix(220, y, 60, 14, 30, f"B_{i + 1}", up, 12)
        arrow((250, y), (292, y), kind=up, dash=dash)
        bars(320, y + 12, (w,), w=22, scale=44)
    vector(40, 116, 90, "x")
    text(375, 116, "the others\nget weight 0", 12, "router")
    for i in range(8):
        y, on = (58 + i * 16, i in (1, 4, 5))
        arrow((474, 116), (515, y), kind="A" if on else "frozen", head=False, dash=not on, width=1.2)
        box(555, y, 76, 10, kind="A" if on else "frozen")
        box(655, y, 76, 10, kind="B" if on else "frozen")
        if on:
            arrow((595, y), (615, y), kind="A")
    vector(466, 116, 90, "x")
    text(765, 116, "a row of A with\na column of B;\n3 of 8 ranks pass", 12, "router")
    vector(40, 305, 90, "x")
    arrow((48, 305), (80, 305), kind="A")
    matrix(112, 305, 64, 76, 24, "A", "A")
    arrow((144, 305), (172, 305), kind="A")
    vector(180, 305, 26, "z", w=11)
    for j, y in enumerate((258, 305, 348)):
        arrow((187, 305), (232, y), kind="B")
        matrix(265, y, 64, 14, 32, f"B_{j + 1}", "B", 12)
        arrow((297, y), (340, 305 + (y - 305) * 0.15), kind="B")
    plus(352, 305, "Σ")
    arrow((180, 320), (180, 384), (205, 384), kind="router")
    box(247, 384, 84, 22, "router", "router", 12)
    arrow((289, 384), (352, 384), (352, 318), kind="router")
    for y, name, w in ((270, "row 1", (0.7, 0.2, 0.1)), (350, "row 2", (0.1, 0.3, 0.6))):
        text(475, y, name, 13)
        arrow((500, y), (540, y), kind="router")
        bars(575, y + 20, w, scale=48)
        arrow((605, y), (650, 310 + (y - 310) * 0.3), kind="router")
        arrow((735, 310 + (y - 310) * 0.3), (775, y), kind="router")
        text(805, y, name, 13)
    bars(692, 326, (0.4, 0.25, 0.35), scale=48)
    text(692, 350, "the mean", 12, "router")
    text(642, 390, "row 1's output now depends on row 2", 12, "loss")


@drawing("13_analysis", 860, 230)
def analysis():
    """Three views of a trained adapter
    Three panels. One: pairs of B's are compared by the cosine of their matrices. Two: router weights of two tasks,
    side by side. Three: one B is taken out of the mix, and the same rows are graded again."""
    for k, title in enumerate(("are the experts copies?", "what do the routers do?", "is an expert missed?")):
        panel(15 + 280 * k, 15, 270, 200, title)
    for x, y, name in ((70, 80, "B_1"), (70, 170, "B_2"), (230, 125, "B_3")):
        matrix(x, y, 60, 18, 40, name, "B", 13)
    for (a, b), (x, y), cosine in (
        (((70, 104), (70, 146)), (102, 125), "0.96"),
        (((102, 86), (198, 114)), (155, 86), "0.03"),
        (((102, 164), (198, 136)), (155, 166), "0.05"),
    ):
        arrow(a, b, kind="loss", head=False)
        text(x, y, cosine, 13, "loss")
    for x, task, weights in ((365, "task 1", (0.9, 0.2, 0.1)), (495, "task 2", (0.15, 0.3, 0.75))):
        bars(x, 165, weights, w=22, scale=90)
        text(x, 190, task, 13)
    for y, name, kind in ((75, "B_1", "B"), (125, "B_2", "frozen"), (175, "B_3", "B")):
        matrix(640, y, 60, 18, 40, name, kind, 13)
        arrow((670, y), (727, 125), kind=kind, dash=kind == "frozen", head=kind == "B")
    plus(740, 125, "Σ")
    arrow((752, 125), (776, 125))
    text(808, 125, "answer\nright or\nwrong?", 12)
    text(698, 190, "weight 0 for B_2", 12, "router", "start")


@drawing("13_full", 860, 330)
def full():
    """A dry run
    A recipe goes four ways: its base's shape becomes a model without weights, whose parameters are counted; two and
    three layers with fake tensors say bytes and operations of a layer; the real rows say how many tokens there are;
    a small random model of the same kind takes two real steps."""
    box(85, 160, 120, 60, "recipe", "plain", 15, bold=True)
    ways = (
        ("shape of the base", "whole model on\nthe meta device", "parameters by part", "frozen"),
        ("2 and 3 layers", "one step with\nfake tensors", "bytes, operations\nof every layer", "A"),
        ("the real rows", "read, checked,\ntokenized", "tokens and padding\nof an epoch", "B"),
        ("small random model", "two real steps\non the CPU", "it runs", "router"),
    )
    for i, (what, how, found, kind) in enumerate(ways):
        y = 48 + i * 76
        arrow((148, 160), (208, y))
        box(290, y, 160, 44, what, kind, 13)
        arrow((372, y), (408, y))
        box(480, y, 140, 48, how, "plain", 12)
        arrow((552, y), (588, y))
        text(655, y, found, 12)
        if i < 3:
            arrow((715, y), (752, 124))
    box(800, 124, 92, 76, "memory,\nhours,\nfits?", "loss", 14, bold=True)


@drawing("14_static", 860, 300)
def static():
    """From a routed adapter to one LoRA
    A routed adapter has a different matrix for each token. Fitted by a regression on calibration rows, or distilled
    through the whole model, it becomes one pair of matrices that any server takes."""
    panel(15, 20, 235, 255, "routed: a matrix for every token")
    for i, y in enumerate((85, 150, 215)):
        matrix(95, y, 50, 48, 24, f"A_{i + 1}", "A", 13)
        matrix(185, y, 50, 24, 48, f"B_{i + 1}", "B", 13)
        for z in (85, 150, 215):
            arrow((121, y), (159, z), kind="router", head=False, width=1)
    ways = (
        ("fitted", "E[e hᵀ] E[h hᵀ]⁻¹, cut to rank R:\nlayer by layer", "A"),
        ("distilled", "trained a little to predict\nas the routed model does", "B"),
    )
    for i, (name, how, kind) in enumerate(ways):
        y = 100 + i * 95
        arrow((252, 148), (292, y))
        box(345, y, 96, 40, name, kind, 14, bold=True)
        text(490, y, how, 12)
        arrow((590, y), (632, 148))
    panel(636, 60, 205, 175, "one LoRA for all tokens")
    matrix(700, 150, 60, 80, 30, "A", "A", 16)
    matrix(780, 150, 60, 30, 80, "B", "B", 16)
    text(738, 215, "PEFT, merge, any server", 12)
    text(430, 285, "every form is measured against the routed adapter on the same test rows", 12, "loss")


@drawing("favicon", 64, 64)
def favicon():
    """d2mora
    The sign of d2mora: a blue trapezoid that projects down beside a red one that projects up."""
    mark("polygon", points="6,8 29,20 29,44 6,56", fill=STROKE["A"])
    mark("polygon", points="35,20 58,8 58,56 35,44", fill=STROKE["B"])


@drawing("card", 1200, 630)
def card():
    """d2mora: mixtures of LoRA experts that pair freely
    The card that is shown where the site is linked: three A's that project down and three B's that project up,
    every A joined to every B, beside the name."""
    rows = (165, 315, 465)
    for a in rows:
        for b in rows:
            arrow((780, a), (930, b), kind="router", head=False, width=3)
    for i, y in enumerate(rows):
        matrix(720, y, 120, 120, 52, f"A_{i + 1}", "A", 30)
        matrix(990, y, 120, 52, 120, f"B_{i + 1}", "B", 30)
    text(80, 235, "d2mora", 92, anchor="start", bold=True)
    text(80, 365, "Mixtures of LoRA experts\nthat pair freely", 38, anchor="start")
    text(80, 480, "a PEFT method to install,\nand the book that it is made of", 27, "plain", anchor="start")


def main():
    "Write all drawings, and remove none: other images may live in the folder."
    for name in DRAWINGS:
        (IMAGES / f"{name}.svg").write_text(svg(name), encoding="utf-8")
    print(f"{len(DRAWINGS)} drawings in {IMAGES}")


if __name__ == "__main__":
    main()
