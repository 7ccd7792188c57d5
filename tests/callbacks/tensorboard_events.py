"""What TensorBoard finds in the files of a run."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

LAYOUT = "custom_scalars__config__"


def events(folder):
    accumulator = EventAccumulator(str(folder / "version_0"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return accumulator.Reload()


def charts(accumulator):
    """Tag patterns of every chart of the one layout, by title."""
    assert list(accumulator.PluginTagToContent("custom_scalars")) == [LAYOUT]
    (event,) = accumulator.Tensors(LAYOUT)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
