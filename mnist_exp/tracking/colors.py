"""The colors of arms in charts and figures, which color-blind people can distinguish (Okabe and Ito, 2008)."""

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
