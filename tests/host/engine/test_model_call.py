"""The wrapper around a model call, the rows of its batch, and the evaluation behind it."""

from __future__ import annotations

from uuid import uuid4

import torch
from comfyui_concepts.host.engine.model_call import (
    EVALUATION_SLOT,
    around_model_call,
    conditioning_rows,
    evaluate,
    with_evaluation,
)


def _call(model, options, x):
    context = torch.ones(len(x), 7, 32)
    tables = {"transformer_options": options.get("transformer_options", {})}
    return model.apply_model(x, torch.full((len(x),), 2.0), c_crossattn=context, **tables)


def _conds(number):
    import comfy.samplers

    context = torch.full((1, 7, 32), float(number))
    conds = {"positive": [{"cross_attn": context, "model_conds": {}, "uuid": uuid4()}]}
    noise = torch.zeros(1, 4, 8, 8)
    return lambda model: comfy.samplers.process_conds(model, noise, dict(conds), torch.device("cpu"), noise)["positive"]


def test_a_wrapper_that_only_runs_the_call_changes_nothing(new_model):
    model, x = new_model("EPS").model, torch.randn(2, 4, 8, 8)
    assert torch.equal(_call(model, around_model_call({}, "test", lambda call, run: run(call)), x), _call(model, {}, x))


def test_a_wrapper_changes_the_latent_the_options_and_the_output(new_model):
    model, x, seen = new_model("EPS").model, torch.randn(2, 4, 8, 8), []

    def note(call, run):
        seen.append(call.transformer_options.get("mark"))
        return run(call)

    def change(call, run):
        return -run(call._replace(x=2 * call.x, transformer_options={**call.transformer_options, "mark": 1}))

    options = around_model_call(around_model_call({}, "outer", change), "inner", note)
    assert torch.equal(_call(model, options, x), -_call(model, {}, 2 * x))
    assert seen == [1]


def test_the_options_that_were_given_stay_as_they_are():
    given = {"transformer_options": {"patches": {}}}
    around_model_call(given, "test", lambda call, run: run(call))
    assert given == {"transformer_options": {"patches": {}}}


def test_rows_belong_to_the_entries_in_the_order_of_the_call():
    first, second = uuid4(), uuid4()
    assert conditioning_rows({"uuids": [first, second]}, 6) == [(first, slice(0, 3)), (second, slice(3, 6))]
    assert (
        conditioning_rows({}, 6) == conditioning_rows({"uuids": []}, 6) == conditioning_rows({"uuids": None}, 6) == []
    )


def test_an_evaluation_without_a_function_in_the_slot_is_the_hosts(new_model):
    import comfy.samplers

    patcher = new_model("EPS")
    model = patcher.model
    model.current_patcher = patcher
    conds, x, sigma = [_conds(1)(model), _conds(2)(model)], torch.randn(1, 4, 8, 8), torch.ones(1)
    ours = evaluate(model, conds, x, sigma, {})
    assert all(map(torch.equal, ours, comfy.samplers.calc_cond_batch(model, conds, x, sigma, {})))


def test_a_function_in_the_slot_answers_and_ours_can_chain_it(new_model):
    model, x, sigma = new_model("EPS").model, torch.randn(1, 4, 8, 8), torch.ones(1)
    theirs = {EVALUATION_SLOT: lambda args: [args["input"] for _ in args["conds"]]}
    assert torch.equal(evaluate(model, [None], x, sigma, theirs)[0], x)

    def doubled(args):
        return [2 * out for out in evaluate(args["model"], args["conds"], args["input"], args["sigma"], theirs)]

    assert torch.equal(evaluate(model, [None], x, sigma, with_evaluation(theirs, doubled))[0], 2 * x)
    assert set(theirs) == {EVALUATION_SLOT}
