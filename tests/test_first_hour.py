"""What a user of transformers types in the first hour, on our own model and tokenizer: it works as there, or the error names what to use

Each snippet runs in a namespace with `model`, `tok`, `enc` (a text encoded), `tmp` (a folder), and `new`, a tiny float model."""
import json
import re
import warnings

import pytest
import torch

pytest.importorskip('transformers')
from deepseek_nb import LoraConfig, Model, Tokenizer, Trainer, TrainingArguments  # noqa: E402
from deepseek_nb.core.config import Config  # noqa: E402

TALK = [dict(role='system', content='Answer briefly.'), dict(role='user', content='What is the capital of France?')]
ROWS = [dict(text='Once upon a time there was a king.'), dict(text='The cat sat on the mat.')]*2
TINY = Config('llama', vocab_size=49152, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, inter_dim=16, tie_embeddings=True)
ARGS = "output_dir=tmp, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, disable_tqdm=True"

WORKS = dict(
    encode_and_decode="""
        assert tok(TEXT).input_ids == tok.encode(TEXT) and tok(TEXT)['attention_mask'] == [1]*len(tok(TEXT)['input_ids'])
        assert tok.decode(tok(TEXT, return_tensors='pt').input_ids[0], skip_special_tokens=True) == TEXT""",
    batch_with_padding="""
        batch = tok([TEXT, 'The'], return_tensors='pt', padding=True, truncation=True, max_length=512).to(model.device)
        out = model.generate(**batch, max_new_tokens=4)
        assert [o[:3] for o in tok.batch_decode(out, skip_special_tokens=True)] == ['Onc', 'The'] and batch.attention_mask[1, 0] == 0""",
    chat="""
        inputs = tok.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        answer = tok.decode(out[0][inputs['input_ids'].shape[-1]:], skip_special_tokens=True)
        assert answer and '<|im_end|>' not in answer and '<|im_end|>' in tok.decode(out[0])""",
    chat_of_older_scripts="""
        ids = tok.apply_chat_template(TALK, add_generation_prompt=True, return_tensors='pt', return_dict=False)
        assert tok.decode(ids[0]).endswith('assistant\\n') and model.generate(ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3""",
    chat_as_text="""
        text = tok.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        assert tok(text).input_ids == tok.apply_chat_template(TALK, add_generation_prompt=True).input_ids""",
    control_tokens="""
        tok.pad_token = tok.eos_token
        assert tok.pad_token_id == tok.eos_token_id == 2 and tok.bos_token == '<|im_start|>' and len(tok) == tok.vocab_size""",
    sampling="""
        torch.manual_seed(0)
        out = model.generate(**enc, max_new_tokens=5, do_sample=True, temperature=.7, top_p=.9, top_k=50, repetition_penalty=1.1)
        assert out.shape[1] == enc.input_ids.shape[1] + 5""",
    several_answers="assert model.generate(**enc, max_new_tokens=3, do_sample=True, temperature=.9, num_return_sequences=3).shape[0] == 3",
    beams="assert model.generate(**enc, max_new_tokens=3, num_beams=2, no_repeat_ngram_size=2, early_stopping=True).shape[0] == 1",
    stop_strings="""
        out = model.generate(**enc, max_new_tokens=40, stop_strings=[' a'], tokenizer=tok)
        assert ' a' in tok.decode(out[0, enc.input_ids.shape[1]:]) and out.shape[1] < 40""",
    words_of_the_apis="""
        out = model.generate(**enc, max_new_tokens=40, n=2, do_sample=True, top_k=1, stop=[' a'], tokenizer=tok)
        assert torch.equal(out[0], out[1]) and ' a' in tok.decode(out[0, enc.input_ids.shape[1]:]) and out.shape[1] < 40""",
    text_streamer="""
        from transformers import TextStreamer
        model.generate(**enc, max_new_tokens=3, streamer=TextStreamer(tok, skip_prompt=True, skip_special_tokens=True))""",
    text_iterator_streamer="""
        from threading import Thread
        from transformers import TextIteratorStreamer
        streamer = TextIteratorStreamer(tok, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = Thread(target=model.generate, kwargs=dict(**enc, max_new_tokens=4, streamer=streamer)); thread.start()
        assert ''.join(streamer) == tok.decode(model.generate(**enc, max_new_tokens=4)[0, enc.input_ids.shape[1]:])
        thread.join()""",
    stopping_criteria="""
        from transformers import StoppingCriteria, StoppingCriteriaList
        class Now(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs): return torch.ones(len(input_ids), dtype=torch.bool)
        out = model.generate(**enc, max_new_tokens=5, stopping_criteria=StoppingCriteriaList([Now()]))
        assert out.shape[1] == enc.input_ids.shape[1] + 1""",
    scores="""
        out = model.generate(**enc, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, use_cache=True)
        assert len(out.scores) == 3 and out.sequences.shape[1] == enc.input_ids.shape[1] + 3""",
    generation_config="""
        from transformers import GenerationConfig
        wanted = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        assert torch.equal(model.generate(**enc, generation_config=wanted), model.generate(**enc, max_new_tokens=3))""",
    logits="""
        with torch.no_grad(): outputs, own = model(**enc), model(enc.input_ids)
        assert torch.equal(outputs.logits, own) and outputs.loss is None""",
    perplexity="""
        with torch.no_grad(): assert 1 < torch.exp(model(enc.input_ids, labels=enc.input_ids).loss) < 1000""",
    training_loop="""
        optimizer = torch.optim.AdamW(new.parameters(), lr=1e-2)
        batch = tok([TEXT, 'The King'], return_tensors='pt', padding=True)
        labels, losses = batch.input_ids.masked_fill(batch.attention_mask == 0, -100), []
        for _ in range(3):
            loss = new(**batch, labels=labels).loss
            loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(loss.item())
        assert losses[2] < losses[0]""",
    cache="""
        with torch.no_grad():
            out = model(input_ids=enc.input_ids, use_cache=True)
            more = model(input_ids=enc.input_ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert more.logits.shape[1] == 1""",
    config="""
        assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (576, 30, 49152)
        assert model.config.eos_token_id == 2 and model.config.max_position_embeddings == 8192
        assert not hasattr(model.config, 'window_size')""",
    device_and_dtype="""
        m = new.eval().to('cpu').to(torch.float64)
        assert next(m.parameters()).device == m.device and m.dtype == torch.float64 and m(**enc).logits.dtype == torch.float32""",
    load_with_their_names="""
        new.save_pretrained(tmp)
        m = Model.from_pretrained(tmp, torch_dtype=torch.float64, device_map='auto', trust_remote_code=True)
        assert m.dtype == torch.float64 and Model.from_pretrained(tmp, dtype='auto').config == m.config""",
    save_and_load="""
        new.save_pretrained(tmp); tok.save_pretrained(tmp)
        assert Tokenizer.from_pretrained(tmp)(TEXT) == tok(TEXT)
        assert torch.equal(Model.from_pretrained(tmp, dtype='float32')(enc.input_ids), new(enc.input_ids))""",
    parameters="""
        hf = new.to_transformers()
        assert hf.num_parameters() == sum(p.numel() for p in new.parameters())
        assert hf.get_input_embeddings() is new.embed_tokens""",
    trainer="""
        trainer = Trainer(model=new, args=TrainingArguments(ARGS, warmup_ratio=.1, lr_scheduler_type='cosine', gradient_checkpointing=True,
            gradient_accumulation_steps=2, weight_decay=.01, save_strategy='no', report_to='none', optim='adamw_torch'),
            train_dataset=ROWS, processing_class=tok)
        assert len(trainer.train()) == 2""",
    best_model="""
        args = TrainingArguments(ARGS, eval_strategy='steps', eval_steps=1, save_strategy='steps', save_steps=1,
            load_best_model_at_end=True, metric_for_best_model='eval_loss', greater_is_better=False)
        trainer = Trainer(model=new, args=args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tok)
        best = min(row['eval_loss'] for row in trainer.train())
        assert abs(trainer.evaluate(ROWS) - best) < 1e-3""",
    lora="""
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=.05, bias='none', task_type='CAUSAL_LM', target_modules=['q_proj', 'v_proj'])
        Trainer(model=new, args=TrainingArguments(ARGS), train_dataset=ROWS, processing_class=tok, peft_config=config).train()""",
    peft="""
        from peft import LoraConfig, get_peft_model
        adapted = get_peft_model(new.to_transformers(), LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'))
        adapted(**enc, labels=enc.input_ids).loss.backward()""",
    pipeline="""
        from transformers import pipeline
        pipe = pipeline('text-generation', model=model.to_transformers(), tokenizer=tok.to_transformers())
        assert pipe(TALK, max_new_tokens=5, do_sample=False)[0]['generated_text'][-1]['content']""",
)
NAMED = dict(  # code, and what the error says
    methods_of_the_tokenizer=("tok.convert_ids_to_tokens([1])", 'Tokenizer.to_transformers'),
    text_pairs=("tok('a', text_pair='b')", 'Tokenizer.to_transformers'),
    unequal_texts=("tok([TEXT, 'The'], return_tensors='pt')", 'padding=True'),
    the_encoding_as_a_prompt=("model.generate(enc)", r'\*\*'),
    hidden_states=("model(**enc, output_hidden_states=True)", 'residual_stream'),
    methods_of_the_model=("model.num_parameters()", 'Model.to_transformers'),
    four_bits=("Model.from_pretrained('smollm2-135m', load_in_4bit=True)", "dtype='int4'"),
    old_spellings=("TrainingArguments(ARGS, evaluation_strategy='epoch')", 'eval_strategy'),
    other_arguments=("TrainingArguments(ARGS, neftune_noise_alpha=5)", 'to_transformers'),
    other_adapters=("LoraConfig(modules_to_save=['lm_head'], target_modules=['q_proj'])", 'to_transformers'),
    codes_are_not_trained=("Trainer(model=model, args=TrainingArguments(ARGS), train_dataset=ROWS, processing_class=tok)",
                           r"Model.from_pretrained\('.*', dtype='float32'\)"),
)


@pytest.fixture(scope='module')
def loaded(): return Model.from_pretrained('smollm2-135m', device='cpu')


@pytest.fixture
def space(loaded, tmp_path):
    tok = Tokenizer.from_pretrained('smollm2-135m')
    text, new = 'Once upon a time', Model(TINY, 'float32', 'cpu')
    return dict(model=loaded, tok=tok, new=new, enc=tok(text, return_tensors='pt'), tmp=tmp_path/'out', TEXT=text, TALK=TALK, ROWS=ROWS,
                torch=torch, Model=Model, Tokenizer=Tokenizer, Trainer=Trainer, TrainingArguments=TrainingArguments, LoraConfig=LoraConfig)


def run(code, space):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exec(re.sub('^ {8}', '', code.replace('ARGS', ARGS), flags=re.M).strip(), space)


@pytest.mark.parametrize('name', WORKS)
def test_it_works(name, space): run(WORKS[name], space)


@pytest.mark.parametrize('name', NAMED)
def test_the_error_names_what_to_use(name, space):
    code, said = NAMED[name]
    with pytest.raises(Exception, match=said) as e: run(code, space)
    assert isinstance(e.value, TypeError | ValueError | AttributeError) and '\n' not in str(e.value)


def test_how_many(): assert len(WORKS) >= 27


def test_losses_go_to_the_trackers_of_accelerate(space, monkeypatch):
    tracking, sent = pytest.importorskip('accelerate.tracking'), []
    class Spy(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = 'spy', True, None
        def __init__(self, run_name, logging_dir): super().__init__(); sent.append((run_name, logging_dir))
        def log(self, values, step): sent.append((step, values))
        def finish(self): sent.append('finished')
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, 'spy', Spy)
    run("Trainer(new, TrainingArguments(ARGS, report_to=['spy']), ROWS, processing_class=tok).train()", space)
    assert sent[0] == ('out', str(space['tmp']/'runs')) and sent[-1] == 'finished'
    assert [s for s, v in sent[1:-1] if v['train/loss'] > 0] == [1, 2]
    with pytest.raises(ValueError, match="report_to 'tensorbord' is not known; known are .*tensorboard"):
        run("Trainer(new, TrainingArguments(max_steps=1, report_to='tensorbord'), ROWS, processing_class=tok).train()", space)
    for name in ('tensorboard', 'wandb'):
        try: __import__(name)
        except ImportError:
            with pytest.raises(ImportError, match=f'pip install accelerate {name}'):
                run(f"Trainer(new, TrainingArguments(max_steps=1, report_to={name!r}), ROWS, processing_class=tok).train()", space)


def test_an_adapter_names_seven_layers_and_peft_loads_it(space, tmp_path):
    "Instead of a path for each layer; with layers left out, the paths"
    peft = pytest.importorskip('peft')
    space['new'].save_pretrained(tmp_path/'base')
    for exclude, n in ((None, 7), (['k_proj'], 6)):
        model = LoraConfig(target_modules='all-linear', exclude_modules=exclude).apply(Model.from_pretrained(tmp_path/'base', 'float32'))
        folder = model.save_adapter(tmp_path/f'adapter{n}')
        assert len(json.loads((folder/'adapter_config.json').read_text())['target_modules']) == n
        hf = Model.from_pretrained(tmp_path/'base', 'float32').to_transformers()
        loaded = peft.PeftModel.from_pretrained(hf, folder)
        torch.testing.assert_close(loaded(**space['enc']).logits, model(space['enc'].input_ids), atol=1e-4, rtol=1e-4)
