"""A figure with sliders."""

from collections.abc import Callable

from slimllm_nb.plots.style import Picture


def with_sliders(draw: Callable[..., Picture], **ranges: tuple[float, float, float]) -> None:
    """Show draw(**values), and below it a slider for each value: (lowest, highest, first).

    Moving one draws again into the same place. Where no kernel runs, the picture of the first values stays.
    """
    import ipywidgets
    from IPython.display import display

    sliders = {
        name: ipywidgets.FloatSlider(first, min=low, max=high, step=(high - low) / 100, description=name)
        for name, (low, high, first) in ranges.items()
    }

    def picture() -> Picture:
        return draw(**{name: slider.value for name, slider in sliders.items()})

    shown = display(picture(), display_id=True)
    for slider in sliders.values():
        slider.continuous_update = False
        slider.observe(lambda _: shown.update(picture()), names="value")
    display(ipywidgets.VBox(list(sliders.values())))
