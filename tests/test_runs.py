"The verbs that read a file: they run, go on, and refuse what they can't read"
import json
import os
import socket

import datasets
import pytest
import torch
import warm

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.eval import choice
from deepseek_nb.tools import cli
from deepseek_nb.train import convert as repairs
from deepseek_nb.train import corpora, runs
from deepseek_nb.train.bpe import save_bpe, train_bpe
from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.resume import checkpoints

LINE = 'Peter Piper picked a peck of pickled peppers, and where is the peck that he picked?\n'
CONFIG = Config('llama', vocab_size=280, dim=32, n_layers=2, n_heads=4, inter_dim=64, n_kv_heads=2, head_dim=8, max_positions=64, bos_id=0,
                eos_ids=(1,))
MODEL = 'name = "small"\ndtype = "float32"\ndevice = "cpu"\n'
DATA = '[data]\nsource = "text.txt"\nlength = 32\n'
TRAINING = '[training]\noutput_dir = "out"\nmax_steps = 4\nsave_steps = 2\nlearning_rate = 0.01\ndisable_tqdm = true\n'
LORA = '[lora]\nr = 4\ntarget_modules = "all-linear"\n'
FILES = dict(
    finetune=f'[model]\n{MODEL}{DATA}{TRAINING}',
    distill=f'output_dir = "out"\nstudent = "a"\nsave_steps = 2\n[models.a]\n{MODEL}[models.b]\n{MODEL.replace("small", "teacher")}{DATA}'
            '[[stage]]\nname = "text"\nsteps = 3\n[[stage]]\nname = "teacher"\nteacher = "b"\nsteps = 3\n',
    convert=f'output_dir = "out"\nto = "mla"\nrows = 16\nsteps = 3\n[model]\n{MODEL}{DATA}[sizes]\nlatent = 24\nrotary = 8\n')
FINISHED = dict(finetune='finished after step 4 of 4', distill='2 of 2 stages were finished', convert='finished earlier')
VERBS = list(FILES)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A model, another of its shape, and a text"
    datasets.disable_progress_bars()
    folder, backend = tmp_path_factory.mktemp('models'), train_bpe([LINE*3], 280)
    for seed, name in enumerate(('small', 'teacher')):
        torch.manual_seed(seed)
        Model(CONFIG, dtype='float32').init_weights(.1).save_pretrained(folder/name)
        save_bpe(backend, folder/name, 64)
    (folder/'text.txt').write_text(LINE*60)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    "A folder of one's own with the same files"
    for p in models.iterdir(): (tmp_path/p.name).symlink_to(p)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(place, capsys):
    "Runs a verb on a file of this text"
    def run(verb, text):
        (place/'run.toml').write_text(text)
        code = cli.main([verb, 'run.toml'])
        out, err = capsys.readouterr()
        return code, out, err
    return run


@pytest.mark.parametrize('verb', VERBS)
def test_runs_and_is_finished_the_second_time(verb, call, place):
    code, out, err = call(verb, FILES[verb])
    assert code == 0, err
    assert 'the result is in out/model' in out and FINISHED[verb] not in out
    first = Model.from_pretrained('out/model', 'float32', 'cpu').state_dict()
    start = Model.from_pretrained('small', 'float32', 'cpu')
    assert (first['norm.weight'].equal(start.norm.weight.detach())) == (verb == 'convert')
    code, out, err = call(verb, FILES[verb])
    assert code == 0 and FINISHED[verb] in out, err
    assert all(t.equal(first[k]) for k, t in Model.from_pretrained('out/model', 'float32', 'cpu').state_dict().items())
    assert cli.main(['generate', 'Peter', '--model', 'out/model', '--device', 'cpu', '--dtype', 'float32', '--max-new-tokens', '2']) == 0


@pytest.mark.parametrize('lora', ['', LORA], ids=['whole', 'lora'])
def test_interrupted_finetuning_ends_as_one_that_was_not(lora, call, place, monkeypatch):
    whole = lambda: 'merge = true\n' + FILES['finetune'] + lora
    assert call('finetune', whole())[0] == 0
    want = Model.from_pretrained('out/model', 'float32', 'cpu').state_dict()

    class Interrupt(Callback):
        def before_update(self, t):
            if t.step == 3: raise KeyboardInterrupt

    make = runs.Trainer
    monkeypatch.setattr(runs, 'Trainer', lambda *a, callbacks, **kw: make(*a, callbacks=[*callbacks, Interrupt()], **kw))
    broken = whole().replace('"out"', '"other"')
    assert call('finetune', broken)[0] == 130
    assert [p.name for p in checkpoints('other')] == ['checkpoint-2'] and not (place/'other'/'model').exists()
    monkeypatch.setattr(runs, 'Trainer', make)
    code, out, _ = call('finetune', broken)
    assert code == 0 and 'continued after step 2 of 4' in out
    got = Model.from_pretrained('other/model', 'float32', 'cpu').state_dict()
    assert all(t.equal(want[k]) for k, t in got.items())


def test_interrupted_conversion_goes_on(call, place, monkeypatch):
    assert call('convert', FILES['convert'])[0] == 0
    want = Model.from_pretrained('out/model', 'float32', 'cpu').state_dict()
    repair, calls = repairs.repair, []

    def once(*args, **kw):
        if calls: raise KeyboardInterrupt
        calls.append(1)
        return repair(*args, **kw)

    monkeypatch.setattr(repairs, 'repair', once)
    other = FILES['convert'].replace('"out"', '"other"')
    assert call('convert', other)[0] == 130
    monkeypatch.setattr(repairs, 'repair', repair)
    code, out, _ = call('convert', other)
    assert code == 0 and '1 of 2 blocks were finished' in out
    assert all(t.equal(want[k]) for k, t in Model.from_pretrained('other/model', 'float32', 'cpu').state_dict().items())


def test_interrupted_distillation_ends_as_one_that_was_not(call, place, monkeypatch):
    assert call('distill', FILES['distill'])[0] == 0
    want = Model.from_pretrained('out/model', 'float32', 'cpu').state_dict()

    class Interrupt(Callback):
        def before_update(self, t):
            if t.step == 2 and 'teacher' in str(t.args.output_dir): raise KeyboardInterrupt

    make = runs.distil_in_stages
    monkeypatch.setattr(runs, 'distil_in_stages', lambda *a, **kw: make(*a, **kw, callbacks=(Interrupt(),)))
    other = FILES['distill'].replace('"out"', '"other"')
    assert call('distill', other)[0] == 130
    assert [p.name for p in checkpoints('other/2-teacher')] == ['checkpoint-2']
    monkeypatch.setattr(runs, 'distil_in_stages', make)
    code, out, _ = call('distill', other)
    assert code == 0 and '1 of 2 stages were finished' in out
    assert all(t.equal(want[k]) for k, t in Model.from_pretrained('other/model', 'float32', 'cpu').state_dict().items())


def test_adapter_beside_few_bits(call, place):
    few = FILES['finetune'].replace('dtype = "float32"', 'quantise = "int4"') + LORA
    code, out, err = call('finetune', few)
    assert code == 0 and 'the result is in out/adapter' in out, err
    start = Model.from_pretrained('small', 'float32', 'cpu')
    assert list(start.load_adapter('out/adapter').peft_config) == ['default']
    code, _, err = call('finetune', few.removesuffix(LORA))
    assert code == 2 and err == 'deepseek-nb: run.toml: quantised weights are frozen; add a table [lora]\n'


def test_chats_and_classes(call, place):
    rows = [dict(messages=[dict(role='user', content=f'Pick {i}'), dict(role='assistant', content='peck')]) for i in range(8)]
    (place/'chat.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    chat = FILES['finetune'].replace('text.txt"', 'chat.jsonl"\nkind = "chat"').replace('= 32', '= 60')
    assert call('finetune', chat)[::2] == (0, '')
    (place/'moods.csv').write_text('text,label\n' + ''.join(f'pick {i},{"ab"[i % 2]}\n' for i in range(20)))
    moods = FILES['finetune'].replace('text.txt"', 'moods.csv"\nkind = "classes"\ntest = 0.3\nclasses = ["a", "b"]').replace('= 32', '= 60')
    code, out, err = call('finetune', moods.replace('"out"', '"moods"'))
    assert code == 0 and 'eval_loss' in out, err


@pytest.mark.parametrize('verb', VERBS)
@pytest.mark.parametrize('change,said', [
    ((DATA, DATA + 'lenght = 3\n'), 'data]: lenght is not known; known are classes, column, kind, label, length,'),
    ((DATA, '[deta]\nx = 1\n' + DATA), 'run.toml: deta is not known; known are '),
    ((DATA, DATA.replace('32', '"long"')), "data]: length is 'long'; it must be of type int"),
    ((DATA, DATA.replace('source = "text.txt"', '')), 'data]: source is missing'),
    ((DATA, DATA.replace('text.txt', 'none.txt')), 'none.txt: no such file'),
    ((DATA, DATA.replace('text', 'te"xt')), 'run.toml: not valid TOML: '),
    (('name = "small"', 'name = "/nowhere/model"'), '/nowhere/model'),
    (('name = "small"', 'nome = "small"'), ']: nome is not known; known are device, dtype, name, quantise'),
], ids=['key', 'table', 'type', 'missing', 'data', 'toml', 'model', 'model key'])
def test_one_line_for_what_cannot_be_read(verb, change, said, call, place):
    code, out, err = call(verb, FILES[verb].replace(*change))
    assert code == 2 and not out and err.count('\n') == 1 and err.startswith('deepseek-nb: ')
    where = 'data' if verb == 'distill' and said.startswith('data]') else ''
    assert (said.replace('data]', where) if where else said) in err
    assert not (place/'out').exists()


@pytest.mark.parametrize('verb', VERBS)
def test_a_file_that_is_not_there(verb, place, capsys):
    assert cli.main([verb, 'none.toml']) == 2
    assert capsys.readouterr().err == 'deepseek-nb: none.toml: no such file; give a TOML file\n'


@pytest.mark.parametrize('verb,change,said', [
    ('finetune', ('max_steps = 4', 'max_steps = 4\nmax_step = 4'), 'run.toml, [training]: max_step is not known; known are '),
    ('finetune', ('[data]', 'quantise = "int3"\n[lora]\ntarget_modules = "all-linear"\n[data]'), 'int3'),
    ('finetune', ('dtype = "float32"', 'dtype = "float31"'), "unknown dtype 'float31'"),
    ('finetune', ('[data]', '[lora]\ntarget_modules = ["q_prj"]\n[data]'), 'q_prj'),
    ('finetune', ('[data]', '[data]\ncolumn = "body"'), "the dataset has no column 'body'; it has text"),
    ('finetune', ('output_dir = "out"', ''), 'run.toml, [training]: output_dir is missing'),
    ('finetune', ('[data]', '[balance]\n[data]'), 'Model has no router to balance; give a model with n_routed_experts'),
    ('finetune', ('[data]', '[balance]\nfactor = 1\n[data]'), 'run.toml, [balance]: factor is not known; known are gamma, sequence, until'),
    ('finetune', ('[data]', '[parallel]\nhow = "apart"\n[data]'), "unknown parallelism 'apart'; known are data, shard, expert"),
    ('finetune', ('[data]', '[lora]\nrank = 4\n[data]'), 'run.toml, [lora]: rank is not known; known are '),
    ('distill', ('teacher = "b"', 'teacher = "c"'), '[[stage]] 2, teacher: c is not known; known are a, b'),
    ('distill', ('student = "a"', 'student = "c"'), 'run.toml, student: c is not known; known are a, b'),
    ('distill', ('name = "text"', 'name = "text"\nstep = 3'), '[[stage]] 1: step is not known; known are '),
    ('distill', ('name = "text"', 'name = "text"\nsettings = {optimizer = "muon"}'), 'settings: optimizer is not known; known are '),
    ('distill', ('teacher = "b"', 'teacher = 2'), '[[stage]] 2: teacher and learns must be names'),
    ('distill', (FILES['distill'][FILES['distill'].index('[[stage]]'):], ''), 'run.toml: stage is missing'),
    ('distill', ('[models.b]', '[texts]\nx = 1\n[models.b]'), 'run.toml, [texts.x]: is 1; it must be a table'),
    ('convert', ('latent = 24', 'experts = 24'), 'run.toml, [sizes]: experts is not known; known are constant, latent, rotary'),
    ('convert', ('"mla"', '"gqa"'), "run.toml: to is 'gqa'; it must be 'mla' or 'moe'"),
    ('convert', ('rows = 16', 'rows = 1600'), 'reduce rows or length')])
def test_one_line_for_what_is_meant_otherwise(verb, change, said, call):
    code, _, err = call(verb, FILES[verb].replace(*change))
    assert code == 2 and err.count('\n') == 1 and said in err


@pytest.mark.parametrize('verb,change', [
    ('finetune', ('0.01', '0.02')), ('distill', ('steps = 3', 'steps = 4')), ('convert', ('rows = 16', 'rows = 17'))])
def test_other_settings_in_the_same_folder_are_refused(verb, change, call):
    assert call(verb, FILES[verb])[0] == 0
    code, _, err = call(verb, FILES[verb].replace(*change))
    assert code == 2 and 'the same' in err and err.count('\n') == 1


@pytest.mark.parametrize('sequence', [0., .1])
def test_a_mixture_is_balanced(place, sequence):
    "The shipped one: its biases move with every step, its loads are noted, and a second loss changes what is learnt"
    text = FILES['finetune'].replace(MODEL, MODEL.replace('small', 'mini'))
    text += f'[balance]\ngamma = 0.01\nuntil = 1.0\nsequence = {sequence}\n'
    (place/'run.toml').write_text(text)
    report = runs.finetune_run('run.toml').report
    assert len(report) == 4 and all(len(r['max_load']) == 5 for r in report)
    before, after = (Model.from_pretrained(n, 'float32', 'cpu').state_dict() for n in ('mini', 'out/model'))
    for k in [k for k in before if k.endswith('correction_bias')]:
        steps = (after[k] - before[k])/.01
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert 0 < steps.abs().max() < 4.001
    (place/'run.toml').write_text(text.partition('[balance]')[0].replace('"out"', '"alone"'))
    alone = runs.finetune_run('run.toml').report
    added = report[0]['loss'] - alone[0]['loss']
    assert 'max_load' not in alone[0] and (added > 1e-3 if sequence else added == 0)


def test_two_processes_share_a_finetuning(place):
    (place/'run.toml').write_text(FILES['finetune'].replace('[data]', '[parallel]\nhow = "data"\n[data]').replace(
        'max_steps', 'per_device_train_batch_size = 4\nmax_steps'))
    (place/'alone.toml').write_text(FILES['finetune'].replace('"out"', '"alone"'))
    assert cli.main(['finetune', 'alone.toml']) == 0
    with socket.create_server(('localhost', 0)) as s: port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')  # as `torchrun` sets them
    ranks = [warm.start('-m', 'deepseek_nb.tools.cli', 'finetune', 'run.toml', env=env | dict(RANK=i, LOCAL_RANK=i), modules=warm.TRAINING)
             for i in '01']
    said = [p.communicate(timeout=300) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0] and ''.join(out for out, _ in said).count('the result is in out/model') == 1, said
    got, want = (Model.from_pretrained(f'{n}/model', 'float32', 'cpu').state_dict() for n in ('out', 'alone'))
    for k, t in want.items(): torch.testing.assert_close(got[k], t, rtol=0, atol=1e-4)


def test_multiple_choice(place, capsys, monkeypatch):
    answers = ['a peck', 'a pick', 'Peter']
    rows = datasets.Dataset.from_list([dict(question=f'What is {i}?', choices=answers, answer=i % 3, passage='') for i in range(9)])
    monkeypatch.setattr(corpora, 'choices', lambda name: rows)
    command = ['eval', 'small', '--choice', 'pecks', '--examples', '5', '--device', 'cpu', '--dtype', 'float32']
    assert cli.main([*command, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    model, tok = cli._load('small', 'float32', 'cpu')
    want = choice.multiple_choice(model, tok, rows.shuffle(seed=0).select(range(5)))
    assert found['examples'] == 5 and found['acc'] == want.acc and found['acc_norm'] == want.acc_norm
    assert cli.main(command) == 0 and 'on 5 questions' in capsys.readouterr().out
    assert cli.main([*command, '--perplexity']) == 2
    assert cli.main([*command[:-6], '--examples', '-1']) == 2


def test_an_examination_that_is_not_known(place, capsys):
    assert cli.main(['eval', 'small', '--choice', 'driving']) == 2
    assert capsys.readouterr().err.startswith("deepseek-nb: unknown examination 'driving': known are mmlu,")


def test_help_lists_all_verbs(python):
    said = python('-m', 'deepseek_nb.tools.cli', '--help')
    assert all(f'\n  {verb} ' in said for verb in cli.VERBS) and {*VERBS} < {*cli.VERBS}
