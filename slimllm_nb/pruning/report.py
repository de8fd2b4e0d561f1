"""What prune() did, as data: `report.model_dump_json()` keeps it, `report.layers` is read layer by layer."""

from pydantic import BaseModel, computed_field


class LayerReport(BaseModel):
    """One decoder layer. Errors are ||kept - full|| / ||full|| of the projection's output over the calibration tokens,
    scales the regression's scale averaged over outputs (paper Figure 2); None where nothing was pruned (or fitted).
    Notes are what a recovery says of itself, such as the penalty that it chose."""

    index: int
    similarity: float | None = None  # None: the method does not ask for it
    ratio: float  # allocated to the heads
    channel_ratio: float | None = None  # allocated to the channels; None: as to the heads
    clipped: bool  # the allocated ratio would have taken every head or every channel
    heads: int
    channels: int
    kept_heads: list[int]
    kept_key_value_heads: list[int]
    kept_channels: list[int]
    attention_error_before: float | None = None
    attention_error_after: float | None = None
    attention_mean_scale: float | None = None
    attention_notes: dict[str, float] = {}
    mlp_error_before: float | None = None
    mlp_error_after: float | None = None
    mlp_mean_scale: float | None = None
    mlp_notes: dict[str, float] = {}
    seconds: float = 0.0


class PartReport(BaseModel):
    """Parameters of the whole model or of its decoder, before and after."""

    before: int
    after: int

    @computed_field
    @property
    def share_left(self) -> float:
        return self.after / self.before


class PruningReport(BaseModel):
    """What was asked for, what came out of it, and every layer."""

    method: str = "slimllm"
    pruning_ratio: float
    pruned_layers: int
    alpha: float
    channel_multiple: int = 1
    target_parameters: float | None
    target_of: str | None
    model: PartReport
    decoder: PartReport
    layers: list[LayerReport]
    seconds: float

    def __str__(self) -> str:
        lines = [] if self.method == "slimllm" else [f"method {self.method}"]
        multiple = f", channels in multiples of {self.channel_multiple}" if self.channel_multiple > 1 else ""
        over = f"over {self.pruned_layers} layers, alpha {self.alpha:g}{multiple}"
        lines.append(f"pruning ratio {self.pruning_ratio:.4f} {over}")
        if self.target_parameters is not None:
            lines.append(f"asked for: {self.target_parameters:.1%} of the parameters of the {self.target_of}")
        for name, part in (("decoder", self.decoder), ("model", self.model)):
            lines.append(f"{name}: {part.before:,} -> {part.after:,} parameters, {part.share_left:.1%} left")
        if clipped := [layer.index for layer in self.layers if layer.clipped]:
            lines.append(f"clipped so that one head and one channel stay: layers {clipped}")
        return "\n".join(lines)
