"""Views: plotly figures, notebook tables and the one-file report. They draw and compute nothing."""

from tl_modules.viz.causes import selectivity_map
from tl_modules.viz.circuit_graph import circuit_html, circuit_page, circuit_svg
from tl_modules.viz.circuit_panels import CircuitPanel, head_map, show_panel
from tl_modules.viz.circuit_plotly import circuit_figure
from tl_modules.viz.doses import dose_curve
from tl_modules.viz.figure import Figure
from tl_modules.viz.hierarchy import split_flows
from tl_modules.viz.html import module_html, modules_html, write_page
from tl_modules.viz.panels import category_mix, heat_map, history, layer_profile, overview
from tl_modules.viz.report import write_report
from tl_modules.viz.sweep import sweep_lines
from tl_modules.viz.tradeoff import tradeoff_lines

__all__ = [
    "CircuitPanel",
    "Figure",
    "category_mix",
    "circuit_figure",
    "circuit_html",
    "circuit_page",
    "circuit_svg",
    "dose_curve",
    "head_map",
    "heat_map",
    "history",
    "layer_profile",
    "module_html",
    "modules_html",
    "overview",
    "selectivity_map",
    "show_panel",
    "split_flows",
    "sweep_lines",
    "tradeoff_lines",
    "write_page",
    "write_report",
]
