"""What the backward pass computes again, and what autograd stores."""

from __future__ import annotations

from tests.mutations.mutation import in_file

ORIGINS = "unit/models/test_origins.py"
BITS = "test_gradients_are_the_same_bits_as_with_all_stored"
NORMS = "test_results_of_norms_are_not_stored"
GATED = "test_of_a_feed_forward_block_the_gate_and_the_other_factor_are_stored"
ALONE = "test_whole_layers_learn_the_same_bits_together_as_alone"

MUTATIONS = [
    *in_file(
        "models/kernels/origins.py",
        ORIGINS,
        (
            "what was changed in place is computed again",
            "origin is not None and origin.version == tensor._version",
            "origin is not None",
            "test_a_result_that_was_changed_in_place_is_stored",
        ),
        (
            "an input is stored although it has an origin",
            "    is_valid = origin is not None and ",
            "    is_valid = False and ",
            NORMS,
        ),
        (
            "an input that is computed again has another dtype",
            "return x.to(ctx.dtype).reshape",
            "return x.reshape",
            BITS,
        ),
    ),
    *in_file(
        "models/kernels/blocks.py",
        ORIGINS,
        (
            "autograd stores what the activation function returns",
            "gated = _Gated.apply(gate, up, self.act_fn)",
            "gated = _gated(gate, up, self.act_fn)",
            GATED,
        ),
        (
            "the gated product is stored",
            "gated = with_origin(gated, functools.partial(_gated, act=self.act_fn), gate, up)",
            "pass",
            GATED,
        ),
        (
            "the other factor learns from the gate before its activation",
            "return grad_gate, grad * opened.detach(), None",
            "return grad_gate, grad * gate.detach(), None",
            "test_what_is_frozen_gets_no_gradient_and_the_rest_the_same",
        ),
    ),
    *in_file(
        "models/kernels/whole_products.py",
        ORIGINS,
        (
            "gradients of an input are summed in the products' dtype",
            "(grad @ weight.to(grad.dtype)).to(ctx.input_dtype)",
            "(grad @ weight.to(grad.dtype))",
            ALONE,
        ),
        (
            "gradients of an input are summed in another order",
            "in zip(reversed(flat), reversed(weights), strict=True)",
            "in zip(flat, weights, strict=True)",
            ALONE,
        ),
        (
            "a layer whose forward was replaced is not called",
            ' and "forward" not in vars(layer)',
            "",
            "test_a_whole_layer_with_a_hook_or_a_forward_of_its_own_is_called",
        ),
        (
            "another dtype is cast in silence",
            "return torch.is_autocast_enabled(x.device.type) or all(",
            "return True or all(",
            "test_whole_layers_of_another_dtype_are_refused_as_by_pytorch",
        ),
        (
            "copies of weights are stored",
            "ctx.save_for_backward(*weights, ",
            "ctx.save_for_backward(*(weight.to(dtype) for weight in weights), ",
            "test_copies_of_weights_are_not_stored",
        ),
    ),
    *in_file(
        "models/kernels/products.py",
        ORIGINS,
        (
            "a whole layer's hook is left out",
            "if any(is_hooked(layer) for layer in layers):",
            "if any(is_hooked(layer) for layer in layers if type(layer) is not nn.Linear):",
            "test_a_whole_layer_with_a_hook_or_a_forward_of_its_own_is_called",
        ),
    ),
]
