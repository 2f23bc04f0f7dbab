"""A model as transformers' own: what generation, PEFT and TRL do with it, against the model itself and against transformers' class

The wheel of transformers has no `GenerationTesterMixin`; the public behaviours that it tests are listed here."""
import copy
import json
import math
import os
import pickle
import runpy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip('transformers')
from deepseek_nb import Model, QuantizedModel, Tokenizer  # noqa: E402
from deepseek_nb.core.dispatch import expect_adapters  # noqa: E402
from deepseek_nb.export.transformers import AllLayers, DeepseekNbConfig, DeepseekNbForCausalLM  # noqa: E402
from deepseek_nb.infer.generate import left_padded  # noqa: E402

SEED = int(os.environ.get('SEED', 0))
KINDS = ['mini', 'mini-v4', 'int4', 'int4-v4']
TEXTS = ['Once upon a time there was a', 'The King']


@pytest.fixture(scope='module', params=KINDS)
def pair(request):
    "A model of transformers, our own with the same weights, and the tokenizer"
    name = 'mini-v4' if 'v4' in request.param else 'mini'
    model = QuantizedModel.from_pretrained(name, 'int4', 'cpu') if 'int4' in request.param else Model.from_pretrained(name, device='cpu')
    return model.to_transformers(), model, Tokenizer.from_pretrained(name).to_transformers()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def encoded(tok, texts=TEXTS): return tok(texts, return_tensors='pt', padding=True)


def test_logits_and_greedy_tokens_are_the_models_own(pair):
    hf, model, tok = pair
    enc = encoded(tok)
    with torch.no_grad():
        assert torch.equal(hf(**enc).logits, model(enc.input_ids, attention_mask=enc.attention_mask))
        assert torch.equal(hf(**enc, logits_to_keep=1).logits, model(enc.input_ids, None, 1, enc.attention_mask))
    own = model.generate(enc.input_ids, 24, attention_mask=enc.attention_mask)
    assert torch.equal(hf.generate(**enc, max_new_tokens=24, do_sample=False), own)
    assert hf.model is model and getattr(hf.lm_head, 'packed', hf.lm_head.weight) is model.head_weight  # no weight is copied


def greedy(pair, n=12, text=TEXTS[:1], **kw):
    hf, _, tok = pair
    return hf.generate(**encoded(tok, text), **dict(max_new_tokens=n, do_sample=False) | kw)


BEHAVIOURS = dict(
    no_cache=dict(use_cache=False), lookup=dict(prompt_lookup_num_tokens=3), one_beam=dict(num_beams=1),
    temperature_unused=dict(max_new_tokens=12, min_new_tokens=12, eos_token_id=None))


@pytest.mark.parametrize('name', BEHAVIOURS)
def test_ways_to_the_same_tokens(pair, name, quiet):
    "With and without a cache, and with drafts: the same tokens, if no two of them are as good as equal"
    if isinstance(pair[1], QuantizedModel) and name in ('no_cache', 'lookup'):
        pytest.skip('codes of activations depend on how many tokens run at once')
    assert torch.equal(greedy(pair, **BEHAVIOURS[name]), greedy(pair))


def test_beams_are_those_without_a_cache(pair):
    "Rows are reordered in the cache: keys, latents, V4's rings and entries, and padding"
    if isinstance(pair[1], QuantizedModel): pytest.skip('codes of activations depend on how many tokens run at once')
    hf = copy.deepcopy(pair[0]).float()  # the scores of beams in bfloat16, which is the dtype on some processors, are often equal
    pair = hf, hf.model, pair[2]
    kw = dict(text=TEXTS, num_beams=3, num_return_sequences=2, no_repeat_ngram_size=3, length_penalty=.7)
    assert torch.equal(greedy(pair, **kw), greedy(pair, **kw, use_cache=False))


def test_an_assistant_drafts_the_same_tokens(pair):
    hf, model, tok = pair
    if isinstance(model, QuantizedModel): pytest.skip('codes of activations depend on how many tokens run at once')
    assert torch.equal(greedy(pair, assistant_model=copy.deepcopy(hf)), greedy(pair))


def test_scores_streams_and_stops(pair, quiet):
    hf, model, tok = pair
    enc = encoded(tok, TEXTS[:1])
    out = greedy(pair, return_dict_in_generate=True, output_scores=True, output_logits=True)
    n = out.sequences.shape[1] - enc.input_ids.shape[1]
    assert len(out.scores) == len(out.logits) == n and out.cache.get_seq_length() == out.sequences.shape[1] - 1
    scores = hf.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (1, n) and (scores <= 0).all()
    streamer = transformers.TextIteratorStreamer(tok, skip_prompt=True, timeout=120)
    threading.Thread(target=hf.generate, kwargs=dict(**enc, max_new_tokens=12, do_sample=False, streamer=streamer)).start()
    assert ''.join(streamer) == tok.decode(greedy(pair)[0, enc.input_ids.shape[1]:])
    word = tok.decode(greedy(pair)[0, -6:-5])
    stopped = greedy(pair, stop_strings=word, tokenizer=tok)
    assert word in tok.decode(stopped[0]) and stopped.shape[1] <= out.sequences.shape[1] - 5
    class Three(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kw): return torch.full((len(ids),), ids.shape[1] >= enc.input_ids.shape[1] + 3)
    assert greedy(pair, stopping_criteria=[Three()]).shape[1] == enc.input_ids.shape[1] + 3
    banned = greedy(pair)[0, enc.input_ids.shape[1]].item()
    assert greedy(pair, bad_words_ids=[[banned]])[0, enc.input_ids.shape[1]] != banned
    only = greedy(pair, prefix_allowed_tokens_fn=lambda b, ids: [5, 6])
    assert set(only[0, enc.input_ids.shape[1]:].tolist()) <= {5, 6}


def test_a_seed_repeats_samples(pair):
    torch.manual_seed(3)
    first = greedy(pair, do_sample=True, num_return_sequences=3, top_k=20, top_p=.9, temperature=.8)
    torch.manual_seed(3)
    assert torch.equal(first, greedy(pair, do_sample=True, num_return_sequences=3, top_k=20, top_p=.9, temperature=.8))
    assert len(first) == 3


@torch.no_grad()
def test_a_cache_goes_on(pair):
    "A prompt computed once, copied, and continued twice"
    hf, _, tok = pair
    enc = encoded(tok, TEXTS[:1])
    out = hf(enc.input_ids[:, :-1], use_cache=True)
    for _ in range(2):
        assert torch.equal(greedy(pair, cache=copy.deepcopy(out.cache)), greedy(pair))
    assert torch.equal(hf(enc.input_ids[:, -1:], cache=copy.deepcopy(out.cache)).logits,
                       hf(enc.input_ids[:, -1:], past_key_values=copy.deepcopy(out.cache)).logits)
    with pytest.raises(TypeError, match='belongs to a model of deepseek_nb'): AllLayers().update(None, None)


def test_saved_loaded_pickled(pair, tmp_path, quiet, monkeypatch):
    hf, model, tok = pair
    monkeypatch.setenv('HF_MODULES_CACHE', str(tmp_path/'modules'))
    hf.save_pretrained(tmp_path/'m')
    tok.save_pretrained(tmp_path/'m')
    enc = encoded(tok)
    want = hf(**enc).logits
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'m', trust_remote_code=True)
    for other in (auto, DeepseekNbForCausalLM.from_pretrained(tmp_path/'m'), pickle.loads(pickle.dumps(hf))):
        assert isinstance(other, DeepseekNbForCausalLM) and type(other.model) is type(model) and torch.equal(other(**enc).logits, want)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path/'m')
    assert back(TEXTS).input_ids == tok(TEXTS).input_ids
    assert Model.from_pretrained(tmp_path/'m').config.model_type == model.config.model_type


def test_a_pickle_of_a_mapped_file_is_no_larger_than_its_weights():
    "Each weight of a GGUF file is a view of the whole file"
    model = Model.from_pretrained('smollm2-135m')
    assert len(pickle.dumps(model)) < 1.2*sum(b.nbytes for b in model.buffers()) + 2**26


def test_loss_is_that_of_transformers(tmp_path):
    "With padding on either side, and with transformers' own class on the saved weights"
    model = Model.from_pretrained('mini', dtype='float32', device='cpu')
    hf, tok = model.to_transformers(), Tokenizer.from_pretrained('mini').to_transformers()
    hf.save_pretrained(tmp_path)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(own).__name__ == 'DeepseekV3ForCausalLM'
    for side in ('left', 'right'):
        enc = tok(TEXTS, return_tensors='pt', padding=True, padding_side=side)
        first = enc.attention_mask.cumsum(1) == 1  # in a padded row, it would be predicted from padding
        labels = enc.input_ids.masked_fill((enc.attention_mask == 0) | first, -100)
        ours, theirs = (m(**enc, labels=labels).loss for m in (hf, own))
        assert abs(ours - theirs).item() < 1e-5 and ours.requires_grad


def test_packed_rows_are_documents():
    hf = Model.from_pretrained('mini', dtype='float32', device='cpu').to_transformers()
    a, b = torch.randint(4000, (1, 5)), torch.randint(4000, (1, 7))
    at = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = hf(torch.cat([a, b], 1), position_ids=at).logits
    torch.testing.assert_close(packed, torch.cat([hf(a).logits, hf(b).logits], 1), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='position_ids must count from 0'): hf(a, position_ids=torch.arange(3, 8)[None])


def test_gradients_are_the_same_when_activations_are_computed_again():
    model = Model.from_pretrained('mini', dtype='float32', device='cpu')
    hf, ids, found = model.to_transformers().train(), torch.randint(4000, (2, 9)), []
    for on in (False, True):
        if on: hf.gradient_checkpointing_enable()
        hf.zero_grad()
        hf(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 50
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_without_transformers_the_error_says_what_to_install():
    "In a fresh process that can't import it"
    code = """import sys
sys.modules['transformers'] = None
from deepseek_nb import Model, Tokenizer
for o in (Model.from_pretrained('mini', device='cpu'), Tokenizer.from_pretrained('mini')):
    try: o.to_transformers()
    except ImportError as e: assert str(e) == f"{type(o).__name__}.to_transformers needs transformers: pip install 'deepseek_nb[hf]'", e
    else: raise SystemExit('no error')
"""
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert not found.returncode, found.stderr


def test_what_is_not_met_is_refused():
    hf = Model.from_pretrained('mini', device='cpu').to_transformers()
    ids = torch.tensor([[5, 6, 7]])
    for kw in (dict(output_hidden_states=True), dict(output_attentions=True), dict(inputs_embeds=torch.zeros(1, 3, 192))):
        with pytest.raises(ValueError, match=f'{next(iter(kw))} is not available'): hf(ids, **kw)
    with pytest.raises(ValueError, match='has a cache of its own'): hf.generate(ids, max_new_tokens=2, cache_implementation='static')
    with pytest.raises(ValueError, match='upload_folder'): hf.save_pretrained('x', push_to_hub=True)
    with pytest.raises(ValueError, match="dtype='int8'"): DeepseekNbForCausalLM.from_pretrained('mini', quantization_config=dict(a=1))
    with pytest.raises(ValueError, match='not used by the model'): hf.generate(ids, max_new_tokenz=2)


def test_a_new_model_from_a_config():
    config = Model.from_pretrained('mini', device='cpu').to_transformers().config
    assert isinstance(config, DeepseekNbConfig) and config.to_dict()['model_type'] == 'deepseek_v3'
    new = transformers.AutoModelForCausalLM.from_config(config)
    assert isinstance(new, DeepseekNbForCausalLM) and new.num_parameters() > 10**6


def distances(hf, adapted, bound):
    "With a new adapter: how far the prompt with a gradient and the last step are from the prompt without one, of the largest logit"
    ids = torch.randint(4000, (2, 7))
    for k, p in adapted.named_parameters():
        if 'lora_A' in k: nn.init.kaiming_uniform_(p.data, a=math.sqrt(5))
        if 'lora_B' in k: p.data.normal_(std=.1)
    with_grad = adapted(ids).logits.detach()
    with torch.no_grad(), adapted.disable_adapter(): before = adapted(ids).logits
    with torch.no_grad():
        after = adapted(ids).logits
        out = adapted(ids[:, :-1], use_cache=True)
        step = adapted(ids[:, -1:], cache=out.cache).logits
    assert (after - before).abs().max() > 5*bound
    return [((got - want).abs().max()/after.abs().max()).item() for got, want in ((with_grad, after), (step, after[:, -1:]))]


@pytest.mark.parametrize('name,quantised', [('mini', False), ('mini', True), ('mini-v4', False)])
def test_peft_adapters_act_in_every_path(name, quantised, tmp_path, quiet):
    """With a gradient, in a prompt, and in decode steps, whose kernels must see the adapter; then saved, loaded and merged. A random
    adapter can lead a token to a near tie of two experts, which rounding decides: of five adapters, three must be near in each path"""
    peft = pytest.importorskip('peft')
    print(f'SEED={SEED}')
    torch.manual_seed(SEED)
    expect_adapters()  # as if this process had adapters of its own too: their twins leave PEFT's alone
    kind, form = (QuantizedModel, 'int8') if quantised else (Model, 'float32')
    load = lambda: kind.from_pretrained(name, form, 'cpu').to_transformers()
    hf = load()
    adapted = peft.get_peft_model(hf, peft.LoraConfig(target_modules='all-linear', task_type='CAUSAL_LM'))
    bound = .2 if quantised else 1e-3  # int8 activations are rounded where no gradient is needed
    far = torch.tensor([distances(hf, adapted, bound) for _ in range(5)])
    assert (far.sort(0).values[2] < bound).all(), far
    ids = torch.randint(4000, (2, 7))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    with torch.no_grad(): torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    if not quantised and name == 'mini':
        ours = Model.from_pretrained(name, dtype='float32', device='cpu')
        ours.load_adapter(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), again(ids).logits, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(again.merge_and_unload()(ids).logits, ours(ids), atol=1e-3, rtol=1e-3)


def arguments(folder, **kw):
    return dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
                save_steps=2, learning_rate=1e-3, disable_tqdm=True) | kw


def names():
    model = Model.from_pretrained('mini', dtype='float32', device='cpu')
    return dict(model=model.to_transformers()), Tokenizer.from_pretrained('mini').to_transformers()


TEXT = [dict(text='Once upon a time there was a king.'), dict(text='The cat sat on the mat and slept.')]*4
PAIRS = [dict(prompt='Once upon', chosen=' a time', rejected=' xx'), dict(prompt='The cat', chosen=' sat', rejected=' yy')]*4
SCRIPTS = {'sft': (TEXT, ''), 'lora': (TEXT, '--use_peft --lora_target_modules all-linear --lora_dropout 0'), 'dpo': (PAIRS, ''),
           'kto': ([dict(prompt=o['prompt'], completion=o[k], label=k == 'chosen') for o in PAIRS for k in ('chosen', 'rejected')], ''),
           'grpo': ([dict(prompt=o['prompt']) for o in PAIRS],
                    f'--num_generations 4 --max_completion_length 8 --reward_funcs {__name__}.lengths_as_rewards')}


def lengths_as_rewards(completions, **_): return [float(len(c)) for c in completions]


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_of_trl_as_they_are(name, tmp_path, quiet, monkeypatch):
    "Run as programs; the import above, which registers our classes, is the line that they lack"
    pytest.importorskip('trl', reason='pip install trl')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    model, tok = names()
    for o in (model['model'], tok): o.save_pretrained(tmp_path/'model')
    rows, more = SCRIPTS[name]
    (tmp_path/'data').mkdir()
    (tmp_path/'data/train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    words = f"""--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/data --output_dir {tmp_path}/out --max_steps 2
        --save_steps 2 --use_cpu --per_device_train_batch_size 4 --report_to none --bf16 False --logging_steps 1
        --learning_rate 1e-3 --disable_tqdm True"""
    script = {'lora': 'sft'}.get(name, name)
    monkeypatch.setattr(sys, 'argv', [script, *words.split(), *more.split()])
    runpy.run_module(f'trl.scripts.{script}', run_name='__main__')
    state = json.loads((tmp_path/'out/checkpoint-2/trainer_state.json').read_text())
    losses = [o['loss'] for o in state['log_history'] if 'loss' in o]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if name != 'grpo': assert losses[1] < losses[0]
    assert [o for o in os.listdir(tmp_path/'out') if o.endswith('.safetensors')]


def test_the_trainer_of_transformers_and_a_pipeline(tmp_path, quiet):
    model, tok = names()
    rows = [dict(tok(o['text']), labels=tok(o['text']).input_ids) for o in TEXT]
    collate = transformers.DataCollatorForSeq2Seq(tok)
    args = transformers.TrainingArguments(**arguments(tmp_path))
    trainer = transformers.Trainer(**model, args=args, train_dataset=rows, data_collator=collate)
    assert trainer.train().training_loss < 7
    assert trainer.evaluate(rows)['eval_loss'] > 0
    pipe = transformers.pipeline('text-generation', model=model['model'], tokenizer=tok)
    assert [len(o) for o in pipe(['Once upon', 'The'], max_new_tokens=4, do_sample=False, batch_size=2)] == [1, 1]


def test_lm_eval_scores_it_as_our_own(quiet):
    hf = pytest.importorskip('lm_eval.models.huggingface', reason="pip install 'deepseek-nb[eval]'")
    from lm_eval.api.instance import Instance
    model, tok = names()
    lm = hf.HFLM(pretrained=model['model'], tokenizer=tok, batch_size=1)
    (got, greedy), = lm.loglikelihood([Instance('loglikelihood', {}, ('Once upon a', ' time'), 0)])
    ids, more = tok('Once upon a').input_ids, tok(' time').input_ids
    with torch.no_grad(): p = model['model'].model(torch.tensor([ids + more])).log_softmax(-1)[0]
    assert abs(got - sum(p[len(ids) - 1 + i, t] for i, t in enumerate(more)).item()) < 1e-3


@pytest.mark.parametrize('name', ['mini', 'mini-v4', 'smollm2-135m'])
def test_the_tokenizer_is_the_same(name):
    tok = Tokenizer.from_pretrained(name)
    hf = tok.to_transformers()
    text = 'Übung 12345 \n\n  done <|im_end|> <｜User｜> 你好 🙂'
    assert hf(text, add_special_tokens=False).input_ids == tok.encode(text, special=True)
    assert hf.decode(tok.encode(text)) == text and hf.eos_token_id in tok.eos_ids and hf.pad_token_id is not None
    chat = [dict(role='user', content='Hello')]
    if tok.chat_template: assert hf.apply_chat_template(chat, add_generation_prompt=True).input_ids == tok.chat(chat)
    ids, mask = left_padded([tok.encode(t) for t in TEXTS], hf.pad_token_id)
    enc = hf(TEXTS, return_tensors='pt', padding=True, add_special_tokens=False)
    assert torch.equal(enc.input_ids, ids) and torch.equal(enc.attention_mask, mask)
