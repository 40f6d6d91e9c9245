"""Draw the book's diagrams: `python book/diagrams.py` writes book/images/*.svg, the same bytes each time.

Diagrams explain; they show no result. Colours are colour-blind safe, and each meaning is also a word, a
pattern or a line style, so that the diagrams can be read in grey. Text is stored as paths, so it looks the
same everywhere.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

IMAGES = Path(__file__).resolve().parent / "images"
INK, GREY, LINE = "#1a1a1a", "#595959", "#8c8c8c"
PLAIN, SEE, WRONG, RIGHT, OURS = "#f2f2f2", "#d6e9f8", "#fbe0cc", "#d3efe4", "#fff3c4"
BLUE, ORANGE, GREEN = "#0072B2", "#C44E00", "#00795A"


ADVERSARY = "adversary: tune a soft prefix until\nthe negative answer is likely\nand the image is neglected"
DEFENCE = (
    "defence: change the located\ndown-projections so that the positive\n"
    "answer wins all the same; a KL term\nholds clean prompts"
)


def canvas(width: float, height: float) -> Axes:
    """An empty drawing of width x height inches, in units of an inch, origin at the lower left."""
    plt.rcParams.update(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "look-closer",
            "font.family": "DejaVu Sans",
            "hatch.linewidth": 0.8,
        }
    )
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def save(axes: Axes, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    axes.figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(axes.figure)


def box(ax: Axes, x, y, w, h, text="", fill=PLAIN, edge=INK, size=10, dashed=False, marked=False, bold=False):
    """A rounded box with text; ``marked`` adds a hatched strip, so that it stands out without its colour."""
    shape = FancyBboxPatch(
        (x, y),
        w,
        h,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=fill,
        edgecolor=edge,
        linewidth=1.3,
        linestyle="--" if dashed else "-",
    )
    ax.add_patch(shape)
    strip = 0.16 if marked else 0.0
    if marked:
        ax.add_patch(
            Rectangle(
                (x + 0.05, y + 0.08),
                strip,
                h - 0.16,
                facecolor="white",
                edgecolor=edge,
                linewidth=0.8,
                hatch="////",
            )
        )
    ax.text(
        x + (w + strip) / 2,
        y + h / 2,
        text,
        ha="center",
        va="center",
        fontsize=size,
        color=INK,
        fontweight="bold" if bold else "normal",
        linespacing=1.35,
    )


def arrow(ax: Axes, start, end, colour=INK, style="-", width=1.5, bend=0.0):
    ax.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": width,
            "linestyle": style,
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
            "mutation_scale": 13,
        },
    )


def note(ax: Axes, x, y, text, size=9, colour=GREY, ha="left", va="center", bold=False):
    ax.text(
        x,
        y,
        text,
        fontsize=size,
        color=colour,
        ha=ha,
        va=va,
        fontweight="bold" if bold else "normal",
        linespacing=1.35,
    )


def method() -> None:
    """Four steps from left to right; the prefix is thrown away, the delta stays."""
    ax = canvas(10.6, 4.5)
    heads = ("1  Activate", "2  Locate", "3  Edit adversarially", "4  Evaluate")
    lefts, widths = (0.1, 2.55, 4.65, 8.5), (2.2, 1.85, 3.6, 2.0)
    for head, x, w in zip(heads, lefts, widths, strict=True):
        box(ax, x, 0.12, w, 4.26, fill="white", edge=LINE)
        note(ax, x + w / 2, 4.12, head, size=12, colour=INK, ha="center", bold=True)
    box(ax, 0.3, 3.2, 1.8, 0.62, "image")
    box(ax, 0.3, 2.05, 1.8, 0.78, "model speculates:\nnegative answer", fill=WRONG, marked=True, size=9.5)
    box(ax, 0.3, 1.02, 1.8, 0.78, "careful, checked:\npositive answer", fill=RIGHT)
    note(ax, 1.2, 0.56, "a detector says what\nis really there", ha="center")
    arrow(ax, (1.2, 3.2), (1.2, 2.84))
    ax.plot([0.3, 0.19, 0.19], [3.5, 3.5, 1.41], color=INK, linewidth=1.5, solid_joinstyle="miter")
    arrow(ax, (0.19, 1.41), (0.31, 1.41))
    box(ax, 2.75, 2.85, 1.45, 0.97, "hidden states of\nboth answers,\nlayer by layer", size=9)
    for i, tall in enumerate((0.35, 0.8, 0.95, 0.55, 0.4, 0.3)):
        chosen = i in (1, 2)
        ax.add_patch(
            Rectangle(
                (2.83 + 0.225 * i, 1.3),
                0.17,
                tall,
                facecolor=BLUE if chosen else "#c9c9c9",
                edgecolor=INK,
                linewidth=0.8,
            )
        )
    note(ax, 3.475, 1.13, "layers", ha="center")
    note(ax, 3.475, 0.56, "where they differ most:\nthese are edited", ha="center")
    arrow(ax, (3.475, 2.85), (3.475, 2.35))
    box(ax, 4.85, 2.9, 3.2, 0.92, ADVERSARY, fill=WRONG, marked=True, size=9)
    box(ax, 4.85, 1.3, 3.2, 1.05, DEFENCE, fill=SEE, size=9)
    arrow(ax, (5.75, 2.9), (5.75, 2.36), colour=ORANGE, style="--")
    note(ax, 5.9, 2.63, "prefix, in training only", colour=INK)
    note(
        ax,
        6.45,
        0.56,
        "then the prefix is thrown away;\nwhat stays is a small change of weights (delta)",
        ha="center",
    )
    box(ax, 8.7, 2.9, 1.6, 0.92, "captions:\nCHAIR, recall,\nlength", size=9)
    box(ax, 8.7, 2.07, 1.6, 0.62, "yes/no\nquestions", size=9)
    box(ax, 8.7, 1.3, 1.6, 0.56, "attention on\nthe image", size=9)
    note(ax, 9.5, 0.56, "edited against\nunedited model", ha="center")
    for x in (2.31, 4.41, 8.26):
        arrow(ax, (x, 2.2), (x + 0.23, 2.2), width=2)
    save(ax, "method")


def model() -> None:
    """The parts of the model, and the few matrices that an edit changes."""
    ax = canvas(10.4, 4.4)
    box(ax, 0.1, 3.05, 0.95, 0.9, "image")
    box(ax, 1.3, 3.05, 1.3, 0.9, "vision tower\n(CLIP)")
    box(ax, 2.85, 3.05, 1.15, 0.9, "projector")
    box(ax, 2.45, 1.75, 1.55, 0.9, "question and\nanswer so far")
    box(
        ax,
        2.45,
        0.45,
        1.55,
        0.9,
        "prefix rows\n(training\nonly)",
        fill=WRONG,
        edge=ORANGE,
        dashed=True,
        marked=True,
        size=9,
    )
    arrow(ax, (1.05, 3.5), (1.3, 3.5))
    arrow(ax, (2.6, 3.5), (2.85, 3.5))
    box(ax, 4.35, 0.45, 0.42, 3.5)
    ax.text(4.56, 2.2, "sequence of vectors", rotation=90, ha="center", va="center", fontsize=9.5, color=INK)
    for y in (3.5, 2.2):
        arrow(ax, (4.0, y), (4.35, y))
    arrow(ax, (4.0, 0.9), (4.35, 0.9), colour=ORANGE, style="--")
    box(ax, 5.05, 0.3, 3.95, 3.8, fill="white", edge=INK)
    note(ax, 7.02, 3.87, "language model: L decoder layers", size=10, colour=INK, ha="center", bold=True)
    arrow(ax, (4.77, 0.85), (5.2, 0.85))
    for i, (label, edited) in enumerate((("last layer", False), ("a located layer", True), ("first layer", False))):
        y = 2.72 - 1.12 * i
        box(ax, 5.2, y, 3.65, 0.92, fill="#fafafa", edge=LINE)
        note(ax, 5.3, y + 0.77, label, size=8.5, colour=INK)
        box(ax, 5.3, y + 0.08, 1.1, 0.54, "attention", size=9)
        box(ax, 6.55, y + 0.08, 0.95, 0.54, "MLP: gate\nand up", size=8)
        box(
            ax,
            7.65,
            y + 0.08,
            1.12,
            0.54,
            "down-\nprojection",
            fill=SEE if edited else PLAIN,
            edge=BLUE if edited else INK,
            size=8,
            bold=edited,
            marked=edited,
        )
        arrow(ax, (6.4, y + 0.35), (6.55, y + 0.35), width=1)
        arrow(ax, (7.5, y + 0.35), (7.65, y + 0.35), width=1)
    for y in (1.4, 2.52):
        arrow(ax, (7.02, y), (7.02, y + 0.2), width=1)
    arrow(ax, (8.85, 3.2), (9.3, 3.2))
    box(ax, 9.3, 2.85, 1.0, 0.7, "next word")
    note(ax, 9.1, 1.9, "the edit changes\nthis matrix,\nnothing else", colour=BLUE, bold=True)
    save(ax, "model")


def flow() -> None:
    """Which stages write what, and who reads it."""
    ax = canvas(10.4, 5.2)
    w, h = 1.7, 0.92
    columns = (0.1, 2.22, 4.34, 6.46, 8.58)
    stages = (  # column, bottom, name, what it writes
        (0, 4.2, "01_world", "images and\nCOCO-format files"),
        (1, 4.2, "02_activate", "pairs"),
        (2, 4.2, "03, 04: locate", "layers and heads,\nand how well found"),
        (3, 4.2, "05: adversary, edit", "prefixes, deltas"),
        (4, 4.2, "06_measure", "captions, answers,\nscores"),
        (0, 2.75, "01_models", "figures of the\nmodel cards"),
        (2, 2.75, "07, 08", "baselines; what each\nchoice does"),
        (3, 2.75, "10_robustness", "fresh attacks on\nevery edit"),
        (4, 2.75, "06_explore", "images, captions\nand maps"),
        (0, 0.1, "09, 10_seeds, 11", "families, seeds,\ncost"),
        (2, 0.1, "04_verdict, 06, 12", "verdicts and\ncomparisons"),
    )
    for column, y, name, wrote in stages:
        x = columns[column]
        box(ax, x, y, w, h, fill=SEE, edge=BLUE)
        note(ax, x + w / 2, y + 0.7, name, size=9.3, colour=INK, ha="center", bold=True)
        note(ax, x + w / 2, y + 0.3, wrote, size=8.5, colour=INK, ha="center")
    for x in columns[:-1]:
        arrow(ax, (x + w, 4.66), (x + w + 0.42, 4.66))
    box(ax, columns[1], 2.75, w, h, "data/models\n(shipped, or by\nmake model)", size=8.5)
    arrow(ax, (columns[1], 3.21), (columns[0] + w, 3.21), colour=GREY)
    arrow(ax, (columns[1] + w, 3.21), (columns[2], 3.21), colour=GREY)
    arrow(ax, (columns[1] + w / 2, 3.67), (columns[1] + w / 2, 4.2), colour=GREY)
    arrow(ax, (columns[1] + w, 4.25), (columns[2] + 0.2, 3.67))  # the pairs
    for column in (3, 4):
        arrow(ax, (columns[column] + w / 2, 4.2), (columns[column] + w / 2, 3.67))
    box(
        ax,
        0.1,
        1.5,
        8.06,
        0.62,
        "collect: metrics.csv, notes.csv, runs.csv, and the tables of single stages",
        fill=OURS,
    )
    for column in (0, 2, 3):
        arrow(ax, (columns[column] + w / 2, 2.75), (columns[column] + w / 2, 2.12))
    arrow(ax, (columns[0] + w / 2, 1.02), (columns[0] + w / 2, 1.5))
    arrow(ax, (8.62, 4.2), (8.3, 2.12))  # the scores of 06_measure
    arrow(ax, (columns[2] + w / 2, 1.5), (columns[2] + w / 2, 1.02))
    box(ax, columns[4], 0.1, w, h, "the pages\n(_build/html)", size=9, fill=RIGHT)
    arrow(ax, (columns[2] + w, 0.56), (columns[4], 0.56))
    arrow(ax, (columns[4] + w / 2, 2.75), (columns[4] + w / 2, 1.02))
    note(ax, columns[1], 0.56, "blue boxes: notebooks,\neach with a folder of\nits own in data/runs", ha="left")
    save(ax, "flow")


def place() -> None:
    """Where the prefix stands in the sequence: computed per item, or at one fixed index."""
    ax = canvas(10.4, 3.75)
    rows = (
        (
            "before the answer\n(default)",
            (("image", 3.0, "n"), ("question", 1.7, "n"), ("prefix", 0.85, "p"), ("answer", 2.2, "a")),
        ),
        (
            "before the question\n(option)",
            (("image", 3.0, "n"), ("prefix", 0.85, "p"), ("question", 1.7, "n"), ("answer", 2.2, "a")),
        ),
        (
            "official code,\nshort question",
            (
                ("image", 3.0, "n"),
                ("question", 1.7, "n"),
                ("answer", 0.75, "a"),
                ("prefix", 0.85, "p"),
                ("rest of it", 1.45, "a"),
            ),
        ),
        (
            "official code,\nlonger question",
            (("image", 3.0, "n"), ("question", 2.45, "n"), ("prefix", 0.85, "p"), ("answer", 1.45, "a")),
        ),
    )
    for i, (label, parts) in enumerate(rows):
        x, y = 2.2, 2.95 - 0.82 * i
        note(ax, 0.1, y + 0.25, label, size=9.5, colour=INK)
        for text, width, kind in parts:
            fill = {"n": PLAIN, "p": WRONG, "a": RIGHT}[kind]
            ax.add_patch(
                Rectangle((x, y), width, 0.5, facecolor=fill, edgecolor=INK, linewidth=1.2 if kind != "p" else 2.6)
            )
            ax.text(
                x + width / 2,
                y + 0.25,
                text,
                ha="center",
                va="center",
                fontsize=9.5,
                color=INK,
                fontweight="bold" if kind == "p" else "normal",
            )
            x += width
    ax.plot([7.65, 7.65], [0.3, 1.95], color=ORANGE, linestyle="--", linewidth=1.6)
    note(ax, 7.65, 0.14, "one fixed index", size=9, colour=ORANGE, ha="center", bold=True)
    save(ax, "prefix-place")


def frontier() -> None:
    """A schematic, without data, of the truncation frontier."""
    ax = canvas(7.4, 4.4)
    ax.annotate("", xy=(6.9, 0.6), xytext=(0.8, 0.6), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3})
    ax.annotate(
        "",
        xy=(0.8, 4.25),
        xytext=(0.8, 0.6),
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3},
    )
    note(
        ax,
        3.85,
        0.3,
        "recall: share of what is there that is named  (more is better)",
        colour=INK,
        ha="center",
    )
    ax.text(0.45, 2.4, "CHAIRs  (less is better)", rotation=90, fontsize=9, color=INK, ha="center", va="center")
    cuts = [(0.8, 0.6), (2.6, 1.15), (4.0, 1.85), (5.1, 2.7), (5.9, 3.75)]
    ax.plot(
        *zip(*cuts, strict=True),
        color=INK,
        linewidth=1.8,
        marker="o",
        markersize=6,
        markerfacecolor="white",
        zorder=3,
    )
    ax.plot(5.9, 3.75, "o", color=INK, markersize=9, zorder=4)
    note(ax, 5.75, 3.95, "base model, whole captions", colour=INK, ha="right", bold=True)
    for (x, y), k in zip(cuts[1:4], ("1 sentence", "2 sentences", "3 sentences"), strict=True):
        note(ax, x - 0.15, y + 0.2, k, ha="right")
    ax.plot(4.0, 1.85, "s", color=GREY, markersize=10, zorder=4)
    note(ax, 4.12, 1.62, "A: only says less", colour=GREY, bold=True)
    ax.plot(5.65, 1.35, "P", color=GREEN, markersize=12, zorder=4)
    note(ax, 5.45, 1.08, "B: better than truncation", colour=GREEN, ha="center", bold=True)
    ax.plot([5.65, 5.65], [1.5, 3.42], color=GREEN, linestyle="--", linewidth=1.5)
    note(ax, 5.78, 2.35, "gap to the\nfrontier", colour=GREEN, bold=True)
    save(ax, "frontier-idea")


if __name__ == "__main__":
    for draw in (method, model, flow, place, frontier):
        draw()
