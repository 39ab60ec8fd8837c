"""One style for figures and pages, light and dark.

Figures are drawn in the light colours. In SVG these become CSS variables of the page, so that figures follow the
reader's setting, which requires unique colours. PNG keeps the light ones.
"""

from __future__ import annotations

# name: (light, dark). No two names may share a light colour.
COLOURS = {
    "surface": ("#fdfdfc", "#14181b"),
    "ink": ("#1d2327", "#e6eaec"),
    "muted": ("#5f6b73", "#9ba7ae"),
    "line": ("#dfe4e7", "#2c3439"),
    "accent": ("#0b6b7d", "#52c3d6"),
    "second": ("#b8562a", "#f09a6d"),
    "third": ("#6c51a8", "#b5a0f0"),
    "fourth": ("#4f7a2c", "#9dca70"),
    "fifth": ("#a63b6e", "#f08db7"),
    "sixth": ("#856a14", "#d9c062"),
}
SURFACE, INK, MUTED, LINE = (COLOURS[name][0] for name in ("surface", "ink", "muted", "line"))
ACCENT, SECOND = COLOURS["accent"][0], COLOURS["second"][0]
# Colours of several runs; their markers differ as well.
SERIES = [COLOURS[name][0] for name in ("accent", "second", "third", "fourth", "fifth", "sixth")]
MARKERS = ["o", "s", "D", "^", "v", "P"]

# Levels of the heat maps, from least to most: close to the page's background, then strong.
LEVELS = 16
_ANCHORS = (("#e8eff0", "#69b2bf", "#083f4c"), ("#212b30", "#2d8496", "#c4f4fa"))

# matplotlib's settings. Sizes are points; a page shows a point as 1.4 pixels.
FIGURE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # what comes from files is no formula
    "axes.unicode_minus": True,
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 5,
    "axes.labelsize": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": SURFACE,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.04,
}


def _ramp(anchors: tuple[str, ...]) -> list[str]:
    points = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in anchors]
    colours = []
    for level in range(LEVELS):
        place = level / (LEVELS - 1) * (len(points) - 1)
        left = min(int(place), len(points) - 2)
        mixed = [a + (b - a) * (place - left) for a, b in zip(points[left], points[left + 1], strict=True)]
        colours.append("#" + "".join(f"{round(part):02x}" for part in mixed))
    return colours


RAMP, _DARK_RAMP = map(_ramp, _ANCHORS)
PALETTE = COLOURS | {f"level-{n}": pair for n, pair in enumerate(zip(RAMP, _DARK_RAMP, strict=True))}
# From a colour as it is drawn to the page's variable.
VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


def css_variables(dark: bool) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in PALETTE.items())
