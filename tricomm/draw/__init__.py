"""Pictures of plans and of pipelines' timelines, as SVG, and traces for Perfetto.

Imports ``plan`` and ``pipeline``, never torch.
"""

from tricomm.draw.plan import plan_svg
from tricomm.draw.timeline import timeline_perfetto, timeline_svg

__all__ = ["plan_svg", "timeline_perfetto", "timeline_svg"]
