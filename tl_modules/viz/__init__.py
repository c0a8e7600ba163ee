"""Views: plotly figures, notebook tables and the one-file report. They draw and compute nothing."""

from tl_modules.viz.figure import Figure
from tl_modules.viz.hierarchy import split_flows
from tl_modules.viz.html import module_html, modules_html
from tl_modules.viz.panels import category_mix, heat_map, history, layer_profile, overview
from tl_modules.viz.report import write_report
from tl_modules.viz.sweep import sweep_lines

__all__ = [
    "Figure",
    "category_mix",
    "heat_map",
    "history",
    "layer_profile",
    "module_html",
    "modules_html",
    "overview",
    "split_flows",
    "sweep_lines",
    "write_report",
]
