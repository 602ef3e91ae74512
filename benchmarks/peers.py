"""The digits MLP in PyTorch, with the weights of the Keras model."""

import numpy as np


def torch_mlp(network, activation):
    """The same network and data for PyTorch.

    Args:
        network: a `networks.Network` of dense layers.
        activation: `"tanh"` or `"relu"`.

    Returns:
        The module, the inputs and the labels.
    """
    import torch

    kinds = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}
    modules = []
    dense = network.model.layers
    for layer in dense:
        kernel, bias = layer.get_weights()
        linear = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(kernel.T.copy()))
            linear.bias.copy_(torch.from_numpy(bias))
        modules += [linear, kinds[activation]()]
    model = torch.nn.Sequential(*modules[:-1])
    return model, torch.from_numpy(network.x), torch.from_numpy(np.int64(network.y))


def torch_gradient(model, x, y):
    """A function that computes the gradient once."""
    import torch

    loss = torch.nn.CrossEntropyLoss()

    def gradient():
        model.zero_grad()
        loss(model(x), y).backward()

    return gradient


def in_keras_order(parts):
    """A list of arrays by PyTorch parameter as one flat vector in Keras' order."""
    arrays = [np.asarray(p.detach().numpy()) for p in parts]
    return np.concatenate([(a.T if a.ndim == 2 else a).ravel() for a in arrays])
