"""Drawing and inspection: text, DOT, Mermaid, SVG and HTML from one ``networkx.MultiDiGraph``.

Nothing here knows the compiler's classes: every function takes the graph that ``ControlGraph.to_networkx`` returns,
whose attributes :func:`gtddp_compile.graph.to_networkx` documents, and returns text.
"""

from gtddp_compile.tools.draw.dot import dot
from gtddp_compile.tools.draw.html import html
from gtddp_compile.tools.draw.mermaid import mermaid
from gtddp_compile.tools.draw.save import SUFFIXES, save
from gtddp_compile.tools.draw.svg import svg
from gtddp_compile.tools.draw.table import table

__all__ = ["SUFFIXES", "dot", "html", "mermaid", "save", "svg", "table"]
