"""Table of the layers with their bits, and a summary of size and operations, for `quantize --dry-run` and `inspect`."""

from dmquant.evaluation.cost import FLOAT_BITS, Cost, LayerCost

HEADINGS = ("layer", "role", "shape", "W bits", "A bits", "MACs, M", "notes")


def tabulate(cost: Cost, *, weight_bits: int, act_bits: int) -> list[list[str]]:
    """Returns one row per layer with the columns HEADINGS.

    The notes give the reason if a layer's bits are not `weight_bits` and `act_bits`, followed by the method's note.
    """
    return [
        [
            layer.name,
            str(layer.role),
            "x".join(map(str, layer.shape)),
            str(layer.weight_bits),
            str(layer.act_bits),
            f"{layer.macs / 1e6:.2f}",
            "; ".join(text for text in (_explain(layer, weight_bits, act_bits), layer.note) if text),
        ]
        for layer in cost.layers
    ]


def summarize(cost: Cost) -> list[str]:
    """Returns lines of text on layers, size and operations, compared with the float model."""
    num_quantized = sum(min(layer.weight_bits, layer.act_bits) < FLOAT_BITS for layer in cost.layers)
    ratio = cost.float_size_bytes / cost.size_bytes
    return [
        f"layers: {num_quantized} of {len(cost.layers)} quantized",
        f"size: {cost.size_bytes / 1e6:.2f} MB, 1/{ratio:.2f} of {cost.float_size_bytes / 1e6:.2f} MB in float32",
        f"bits per weight: {cost.weight_bits_effective:.2f}, scales, biases and norms included",
        f"OPs: {cost.ops / 1e9:.3f} G of {cost.macs / 1e9:.3f} G MACs in float, per denoiser call on one image",
        f"attention products: {cost.attention_macs / 1e9:.3f} G MACs, {_describe_factors(cost.attention_bits)}, not in the OPs",
    ]


def _explain(layer: LayerCost, weight_bits: int, act_bits: int) -> str:
    bits = (layer.weight_bits, layer.act_bits)
    if bits == (weight_bits, act_bits):
        return ""
    return f"{layer.role}: kept in float" if bits == (FLOAT_BITS, FLOAT_BITS) else f"{layer.role}: kept at {bits[0]}/{bits[1]}"


def _describe_factors(bits: int) -> str:
    return "in float" if bits == FLOAT_BITS else f"of factors with {bits} bits"
