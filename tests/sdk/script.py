"""Everything the SDK is for, once: run by the python of each SDK's environment, asserted here, told as JSON.

python script.py URL KEY BASE_MODEL
"""

import json
import math
import sys
from importlib.metadata import version
from typing import Any

import tinker
import torch
from tinker import types

URL, KEY, BASE_MODEL = sys.argv[1:]
TOKENS = [5, 17, 80, 33, 150, 42, 7, 99]
PROMPT = types.ModelInput.from_ints(TOKENS)


def now(result: Any) -> Any:
    """What newer SDKs return as a future, older ones return at once."""
    return result.result() if hasattr(result, "result") else result


def floats(values: list[float]) -> types.TensorData:
    return types.TensorData(data=values, dtype="float32", shape=[len(values)])


def datum(tokens: list[int], **inputs: list[float]) -> types.Datum:
    """Each token's target is the next; every input has one number a target."""
    targets = types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
    tensors = {name: floats(values) for name, values in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets, **tensors}
    )


TEXT = datum(TOKENS, weights=[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def update(training: Any, learning_rate: float = 1e-2) -> dict[str, float]:
    return training.optim_step(types.AdamParams(learning_rate=learning_rate)).result().metrics


def step(training: Any) -> float:
    """One step on the text; returns its loss."""
    backward = training.forward_backward([TEXT], "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
    output = backward.result()
    (found,) = output.loss_fn_outputs
    assert len(found["logprobs"].data) == 7
    assert math.isclose(output.metrics["loss:sum"], -sum(found["logprobs"].data[2:]), rel_tol=1e-4)
    assert stepped.result().metrics["grad_norm:mean"] > 0
    return output.metrics["loss:sum"]


def train_and_resume(client: Any) -> tuple[Any, str, list[float]]:
    """A run that never stops, one that resumes from its middle, and the first sent back to it."""
    training = now(client.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=1))
    losses = [step(training), step(training)]
    path = training.save_state("middle").result().path
    losses += [step(training), step(training)]
    assert losses == sorted(losses, reverse=True), losses
    resumed = now(client.create_training_client_from_state_with_optimizer(path))
    assert [step(resumed), step(resumed)] == losses[2:]
    assert resumed.get_info().model_id != training.get_info().model_id
    training.load_state_with_optimizer(path).result()
    assert step(training) == losses[2]
    training.load_state(path).result()  # weights alone
    return training, path, losses


def sample(client: Any, training: Any) -> Any:
    """Two samples whose logprobs are those that the sampler and the trainer compute for them."""
    path = training.save_weights_for_sampler("middle").result().path
    assert path == f"tinker://{training.get_info().model_id}/sampler_weights/middle", path
    sampler = now(client.create_sampling_client(model_path=path))
    params = types.SamplingParams(max_tokens=3, temperature=1.0, seed=7, stop=[])
    sequences = sampler.sample(PROMPT, num_samples=2, sampling_params=params).result().sequences
    assert [len(sequence.tokens) for sequence in sequences] == [3, 3]
    for sequence in sequences:
        assert sequence.stop_reason == "length"
        whole = TOKENS + list(sequence.tokens)
        computed = sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
        trained = training.forward([datum(whole, weights=[1.0] * 10)], "cross_entropy").result()
        assert computed[0] is None
        assert close(computed[1:], trained.loss_fn_outputs[0]["logprobs"].data)
        assert close(computed[-3:], sequence.logprobs)
    ephemeral = now(training.save_weights_and_get_sampling_client())
    assert ephemeral.compute_logprobs(PROMPT).result() == sampler.compute_logprobs(PROMPT).result()
    return sequences


def close(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(abs(a - b) < 1e-4 for a, b in zip(found, expected, strict=True))


def reinforce(training: Any, sequences: Any) -> dict[str, float]:
    """One step of reinforcement learning: on-policy, so the ratio is 1 and the loss what the advantages say."""
    losses = {}
    data = [
        datum(
            TOKENS + list(sequence.tokens),
            logprobs=[0.0] * 7 + list(sequence.logprobs),
            advantages=[0.0] * 7 + [advantage] * 3,
        )
        for sequence, advantage in zip(sequences, (1.0, -0.5), strict=True)
    ]
    for name in ("importance_sampling", "ppo"):
        output = training.forward_backward(data, name).result()
        losses[name] = output.metrics["loss:sum"]
        assert abs(losses[name] - (-1.0 * 3 + 0.5 * 3)) < 1e-3, losses
        assert [len(found["logprobs"].data) for found in output.loss_fn_outputs] == [10, 10]
    assert update(training)["grad_norm:mean"] > 0
    after = training.forward(data, "importance_sampling").result().metrics["loss:sum"]
    assert after < losses["importance_sampling"], (after, losses)
    return losses


def custom(training: Any) -> None:
    """A loss of the user's own that is cross entropy has its gradient, too."""

    def masked_nll(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss = -sum(
            (found * datum.loss_fn_inputs["weights"].to_torch()).sum()
            for datum, found in zip(data, logprobs, strict=True)
        )
        return loss, {"nll:sum": float(loss.detach())}

    builtin = training.forward_backward([TEXT], "cross_entropy").result().metrics["loss:sum"]
    expected = update(training, learning_rate=0.0)["grad_norm:mean"]
    output = now(training.forward_backward_custom([TEXT], masked_nll))
    found = update(training, learning_rate=0.0)["grad_norm:mean"]
    assert math.isclose(output.metrics["nll:sum"], builtin, rel_tol=1e-5)
    assert math.isclose(found, expected, rel_tol=1e-4), (found, expected)


def listings(client: Any, training: Any, path: str) -> list[str]:
    """Runs and checkpoints are listed, and a deleted checkpoint no more."""
    rest = now(client.create_rest_client())
    run_id = training.get_info().model_id
    run = rest.get_training_run(run_id).result()
    assert (run.training_run_id, run.base_model, run.is_lora, run.lora_rank) == (run_id, BASE_MODEL, True, 4)
    assert run_id in [found.training_run_id for found in rest.list_training_runs(limit=100).result().training_runs]
    info = now(rest.get_weights_info_by_tinker_path(path))
    assert (info.base_model, info.lora_rank) == (BASE_MODEL, 4)

    def checkpoints() -> list[str]:
        return sorted(found.checkpoint_id for found in rest.list_checkpoints(run_id).result().checkpoints)

    before = checkpoints()
    mine = {found.tinker_path for found in rest.list_user_checkpoints(limit=100).result().checkpoints}
    assert path in mine
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert checkpoints() == [name for name in before if name != "weights/middle"]
    try:
        now(client.create_training_client_from_state_with_optimizer(path))
    except (tinker.NotFoundError, tinker.RequestFailedError):
        return before
    raise AssertionError("a deleted checkpoint was loaded")


def main() -> None:
    client = tinker.ServiceClient(base_url=URL, api_key=KEY)
    models = now(client.get_server_capabilities()).supported_models
    assert BASE_MODEL in [model.model_name for model in models]
    training, path, losses = train_and_resume(client)
    sequences = sample(client, training)
    custom(training)
    rewarded = reinforce(training, sequences)
    before = listings(client, training, path)
    told = {
        "sdk": version("tinker"),
        "losses": losses,
        "samples": [list(sequence.tokens) for sequence in sequences],
        "logprobs": [list(sequence.logprobs) for sequence in sequences],
        "rewarded": rewarded,
        "checkpoints": before,
    }
    print(json.dumps(told))


main()
