"""A peer in JAX: the nested critic steps and the hypergradient in closed form, jit-compiled, for scale.

    python benchmarks/jax_peer.py '{"num_segments": 1, "length": 640, ...}'

Runs in an environment of its own (``pip install jax``), started by ``benchmarks.update_phase --peer``. One call of a
jitted function takes the players through all minibatches of an update phase, on random data, with as many slots,
parameters, nested steps and Hessian rows as BLPO has. Prints the milliseconds per minibatch of each kind.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

GAMMA, LAMBDA, CLIP, DAMPING, BOUND = 0.99, 0.95, 0.2, 50.0, 1.0


def perceptron(sizes, key):
    """Weights and biases, layer by layer."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (i, o)) / math.sqrt(i), jnp.zeros(o))
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(layers, x):
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def adam(state, gradient, rate):
    """One step of Adam on a tree: (parameters, first moments, second moments, number of steps)."""
    parameters, first, second, step = state
    step = step + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
    rate, root = rate / (1 - 0.9**step), jnp.sqrt(1 - 0.999**step)
    parameters = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + 1e-5), parameters, first, second)
    return parameters, first, second, step


def start(parameters):
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    return parameters, zeros, zeros, jnp.zeros(())


def log_probability(actor, batch, discrete):
    layers, log_std = actor
    outputs = apply(layers, batch["obs"])[:, :-1]
    if discrete:
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), batch["actions"][..., None], -1)[..., 0]
    deviation = (batch["actions"] - outputs) * jnp.exp(-log_std)
    return (-0.5 * deviation**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def update(states, batch, *, nested, columns, discrete, summed):
    """One minibatch: see blpo_rllib/core/hypergradient.py for the symbols."""
    actor_state, critic_state = states
    num_steps = batch["rewards"].size

    def loss(w):
        return ((batch["targets"] - apply(w, batch["obs"])[:, :-1, 0]) ** 2).mean()

    for _ in range(nested):
        critic_state = adam(critic_state, jax.grad(loss)(critic_state[0]), 1.2e-3)
    w, theta = critic_state[0], actor_state[0]
    values, values_vjp = jax.vjp(lambda w: apply(w, batch["obs"])[..., 0], w)

    def difference(v):
        return GAMMA * v[:, 1:] - v[:, :-1]

    adv = (batch["rewards"] + difference(values)) @ summed
    logp, logp_vjp = jax.vjp(lambda t: log_probability(t, batch, discrete), theta)
    ratio = jnp.exp(logp - batch["old_logp"])
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    active = ratio * adv <= clipped * adv
    (gradient,) = logp_vjp(jnp.where(active, -ratio * adv, 0.0) / num_steps)
    direction = gradient
    if columns is not None:
        back = (-jnp.where(active, ratio, clipped) / num_steps) @ summed.T
        cotangent = jnp.pad(GAMMA * back, ((0, 0), (1, 0))) - jnp.pad(back, ((0, 0), (0, 1)))
        flat, unflatten = ravel_pytree(w)
        (v,) = values_vjp(cotangent)
        v = ravel_pytree(v)[0]
        flat_gradient = jax.grad(lambda x: loss(unflatten(x)))
        units = jnp.zeros((len(columns), flat.size)).at[jnp.arange(len(columns)), jnp.array(columns)].set(1.0)
        c = jax.vmap(lambda u: jax.jvp(flat_gradient, (flat,), (u,))[1])(units)
        core = c[:, jnp.array(columns)] + jnp.eye(len(columns))
        x = (v - c.T @ jnp.linalg.solve(c @ c.T + DAMPING * core, c @ v)) / DAMPING
        change = jax.jvp(lambda x: apply(unflatten(x), batch["obs"])[..., 0], (flat,), (x,))[1]
        adv_change = difference(change) @ summed
        weights = -2 * ratio * (adv_change * (batch["targets"] - values[:, :-1]) - adv * change[:, :-1])
        (mixed,) = logp_vjp(weights)
        scale = jnp.minimum(1.0, BOUND * norm_of(gradient) / norm_of(mixed))
        direction = jax.tree.map(lambda g, m: g - scale * m, gradient, mixed)
    return (adam(actor_state, direction, 3e-4), critic_state), norm_of(direction)


def norm_of(tree):
    return jnp.sqrt(sum((y**2).sum() for y in jax.tree.leaves(tree)))


def milliseconds(shape, nested_only):
    """Median milliseconds per minibatch over phases of ``num_minibatches``."""
    m, b, s = shape["num_minibatches"], shape["num_segments"], shape["length"]
    keys = jax.random.split(jax.random.key(0), 8)
    outputs, discrete = shape["outputs"], shape["discrete"]
    sizes = [shape["observation_size"], *shape["hiddens"]]
    actor = start((perceptron([*sizes, outputs], keys[0]), jnp.zeros(outputs)))
    critic = start(perceptron([*sizes, 1], keys[1]))
    actions = jax.random.normal(keys[3], (m, b, s, outputs))
    batches = {
        "obs": jax.random.normal(keys[2], (m, b, s + 1, shape["observation_size"])),
        "actions": jax.random.randint(keys[3], (m, b, s), 0, outputs) if discrete else actions,
        "rewards": jax.random.normal(keys[4], (m, b, s)),
        "targets": jax.random.normal(keys[5], (m, b, s)),
        "old_logp": jnp.full((m, b, s), -0.7 if discrete else -3.0),
    }
    exponents = jnp.arange(s)[:, None] - jnp.arange(s)
    summed = jnp.where(exponents >= 0, (GAMMA * LAMBDA) ** exponents, 0.0)
    size = sum(x.size for x in jax.tree.leaves(critic[0]))
    columns = tuple(range(7, size, size // shape["rank"]))[: shape["rank"]]
    one = functools.partial(
        update,
        nested=shape["num_critic_updates"],
        columns=None if nested_only else columns,
        discrete=discrete,
        summed=summed,
    )
    phase = jax.jit(lambda states, batches: lax.scan(one, states, batches))
    times = []
    for _ in range(shape["rounds"] + 2):
        begun = time.perf_counter()
        jax.block_until_ready(phase((actor, critic), batches))
        times.append(1e3 * (time.perf_counter() - begun) / m)
    return statistics.median(times[2:])


def main() -> None:
    shape = json.loads(sys.argv[1])
    if shape["threads"] == 1:
        # XLA has no other way to say so.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(json.dumps({"jax_nested": milliseconds(shape, True), "jax_blpo": milliseconds(shape, False)}))


if __name__ == "__main__":
    main()
