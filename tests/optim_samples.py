"""What the tests of the optimizers share: parameters, gradients and comparisons."""

import torch


def parameters_of(default_shapes, default_dtype=torch.float64):
    """Return a function that makes parameters of these shapes, or others, the same for one seed in any dtype."""

    def make_parameters(shapes=default_shapes, seed=0, dtype=default_dtype):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [torch.nn.Parameter(tensor.to(dtype)) for tensor in drawn]

    return make_parameters


def set_grads(parameters, step, seed=1):
    """Set random gradients, the same for one step and seed in any dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = grad.to(parameter.dtype)


def set_pulling_grads(parameters, step, seed=1):
    """Set gradients that pull to 0, with noise: an estimate of the distance needs somewhere to go."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.grad = parameter.detach() + 0.3 * noise


def largest_difference(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]
