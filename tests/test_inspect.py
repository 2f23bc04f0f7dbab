"Defects: spectrograms, wafer maps and their pairing, fusion against slow loops, missing modalities, files, unknown pieces, the command"
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek_nb.apps.command import find_app, score_file
from deepseek_nb.apps.inspect import (
    FusionConfig,
    FusionNet,
    FusionSettings,
    Inspector,
    Modalities,
    decode_png,
    fit_known,
    heat_map,
    read_picture,
    read_wav,
    strangeness,
    train_fusion,
    write_wav,
)
from deepseek_nb.apps.wafers import (
    CAUSES,
    PairingRule,
    SpectrogramConfig,
    WaferMaps,
    bearing_vibration,
    draw_pieces,
    draw_pool,
    drop_repeated_maps,
    fault_rates,
    log_mel,
    mel_bands,
    plant_defect,
    read_wm811k,
    resize_nearest,
    rule_ceilings,
    write_wafers,
)
from deepseek_nb.studies import open_study, read_plan, runs, to_do

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def seed():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return n


def disc(size):
    at = torch.arange(size) - (size - 1)/2
    return (at[:, None]**2 + at**2 < size**2/4).byte()


def wafers(n, size, g, share=.05): return (disc(size) + (torch.rand(n, size, size, generator=g) < share)*disc(size)).byte()


def network(seed, **sizes):
    torch.manual_seed(seed)
    net = FusionNet(FusionConfig(**dict(dict(size=16, frames=24, bands=16, dim=16), **sizes))).eval().requires_grad_(False)
    for p in net.parameters(): p += .2*torch.randn_like(p)
    return net


@pytest.fixture(scope='module')
def shipped(): return Inspector.shipped()


def test_the_spectrogram_is_that_of_torch(seed):
    draw = random.Random(seed)
    c = SpectrogramConfig(frame=(n := draw.choice([128, 256])), hop=n//2, samples=n*8, bands=draw.choice([8, 16]))
    x = torch.randn(3, c.samples)*draw.uniform(.01, 100)
    window = torch.hann_window(n)
    power = torch.stft(x/x.square().mean(1, keepdim=True).sqrt(), n, n//2, window=window, center=False, return_complex=True).abs()**2
    torch.testing.assert_close(log_mel(x, c), (power.mT/window.square().sum() @ mel_bands(c) + c.floor).log(), atol=1e-4, rtol=1e-3)


def test_knocks_have_the_rate_of_their_fault(seed):
    "The spectrum of the size of a long stretch of knocks has its peak at the rate, or at a multiple of it"
    c = SpectrogramConfig(samples=60_000)
    kind,full = torch.tensor([1, 2]),torch.full((2,), 1e4)
    x = bearing_vibration(kind, torch.tensor([.5, .5]), full, c, torch.Generator().manual_seed(seed), width=9.)
    power = torch.fft.rfft(x.abs() - x.abs().mean(1, keepdim=True)).abs()[:, 100:]
    for p,rate in zip(power, fault_rates(29.95).values(), strict=True):
        turns = (p.argmax().item() + 100)*c.rate/c.samples/rate
        assert abs(turns/round(turns) - 1) < .1 # the shaft's speed varies by 2%, one standard deviation


def test_no_map_occurs_twice_or_in_two_parts(seed, tmp_path):
    r = np.random.default_rng(seed)
    some = [r.integers(0, 3, r.integers(3, 9, 2), dtype=np.uint8) for _ in range(12)]
    same = np.concatenate([some[0].ravel()]) # the same bytes in another shape are another map
    reshaped = same.reshape(1, -1)
    for name,maps in dict(train_1_split=some[:6] + some[:2] + [reshaped], val_data=some[4:9], test_data=some[7:] + some[:1]).items():
        write_wafers(tmp_path/f'{name}.npz', maps, [0]*len(maps), ('None',))
    parts = open_study('inspect').clean_parts(read_wm811k(tmp_path))
    marks = [(m.shape, m.tobytes()) for p in parts.values() for m in p.maps]
    assert len(marks) == len({*marks}) == len({(m.shape, m.tobytes()) for m in [*some, reshaped]})
    assert len(parts['val'].maps) == 3 and len(drop_repeated_maps(WaferMaps(some, np.arange(12), ('a',)), some).maps) == 0


def test_resizing_invents_no_state_and_forgets_none(seed):
    r = np.random.default_rng(seed)
    m = r.integers(0, 3, (int(r.integers(5, 30)), int(r.integers(5, 30))), dtype=np.uint8)
    big = resize_nearest(m, 64)
    assert {*np.unique(big)} == {*np.unique(m)}
    assert (big[(np.arange(m.shape[0])*64 + 32)//m.shape[0]][:, (np.arange(m.shape[1])*64 + 32)//m.shape[1]] == m).all()


def test_planted_defects_have_their_size_and_place(seed):
    g = torch.Generator().manual_seed(seed)
    maps,size = wafers(50, 32, g),torch.randint(0, 30, (50,), generator=g)
    spoiled,where = plant_defect(maps, torch.full((50,), .5), size, g)
    assert (where.sum((1, 2)) - size).abs().max() <= 1 # two dies may be equally near
    assert torch.equal(spoiled[~where], maps[~where]) and (spoiled[where] == 2).all() and not (where & (maps == 0)).any()


def test_a_perfect_reader_of_one_modality_reaches_the_ceiling(seed):
    "The best answer to each state of one modality, counted; the control has nothing to find beyond the picture"
    g = torch.Generator().manual_seed(seed)
    rule = PairingRule(stray=random.Random(seed).choice([.25, .5, .75, 1.]), smallest=9, largest=9)
    pool = draw_pool(90, rule, SpectrogramConfig(), g)
    pool = pool._replace(spectrograms=pool.kind[:, None, None].float())

    def best(state, labels):
        n = torch.zeros(int(state.max()) + 1, 4).index_put((state, labels), torch.tensor(1.), accumulate=True)
        return (n.amax(1).sum()/n.sum()).item()
    n = 12_500
    p = draw_pieces(n, disc(32)[None], pool, rule, g)
    kind,defect = p.spectrograms[:, 0, 0].long(),p.where.any(1).any(1).long()
    noise = 5.3*(.25/n)**.5 + .01 # 5.3 standard errors, one in ten million, and what the best answer gains by counting
    assert abs(best(defect, p.labels) - rule_ceilings(rule)['picture']) < noise
    assert abs(best(kind, p.labels) - rule_ceilings(rule)['vibration']) < noise
    control = draw_pieces(n, disc(32)[None], pool, PairingRule(rule.stray, pairing='independent'), g)
    kind,defect = control.spectrograms[:, 0, 0].long(),control.where.any(1).any(1).long()
    assert abs(best(3*defect + kind, control.labels) - best(defect, control.labels)) < noise


@pytest.mark.parametrize('fusion', ['cross', 'concat'])
def test_what_is_missing_is_not_read_piece_by_piece(seed, fusion):
    net,b = network(seed, fusion=fusion),6
    torch.manual_seed(seed)
    pictures,sounds = torch.randint(3, (b, 16, 16)).byte(),torch.randn(b, 24, 16)
    there = Modalities(torch.tensor([1., 1, 1, 0, 0, 1]), torch.tensor([1., 0, 1, 1, 1, 0]))
    mixed = net(pictures, sounds, there)
    for i in range(b):
        one = net(pictures[i:i+1] if there.picture[i] else None, sounds[i:i+1] if there.vibration[i] else None)
        torch.testing.assert_close(mixed[i:i+1], one, atol=1e-4, rtol=1e-4)
    both = net(pictures, sounds)
    assert (both[0] - mixed[0]).abs().max() < 1e-4 < (both[1] - mixed[1]).abs().max()


def test_each_modality_reads_the_other_against_a_slow_loop(seed):
    net = network(seed, dim=24, heads=2)
    attn = net.cross['picture']
    torch.manual_seed(seed)
    x,y,at_x,at_y = torch.randn(2, 4, 24),torch.randn(2, 3, 24),torch.randn(4, 12),torch.randn(3, 12)
    out = torch.zeros(2, 4, 24)
    for b in range(2):
        for i in range(4):
            for h in range(2):
                part = slice(12*h, 12*h + 12)
                q = (attn.q.weight @ x[b, i] + attn.at_q.weight @ at_x[i])[part]
                e = [math.exp(q @ (attn.k.weight @ y[b, j] + attn.at_k.weight @ at_y[j])[part]/12**.5) for j in range(3)]
                out[b, i, part] = sum(w/sum(e)*(attn.v.weight @ y[b, j])[part] for j,w in enumerate(e))
    torch.testing.assert_close(attn(x, y, at_x, at_y), out @ attn.o.weight.T, atol=1e-4, rtol=1e-3)
    pictures,sounds = torch.randint(3, (1, 16, 16)).byte(),torch.randn(1, 24, 16)
    tokens = net.tokens(*net.prepared(pictures, sounds))
    for k,other in (('picture', (pictures, sounds.flip(1))), ('vibration', (pictures.flip(1), sounds))):
        assert (net.tokens(*net.prepared(*other))[k] - tokens[k]).abs().max() > 1e-4


def test_the_evidence_adds_up_to_the_decision(seed):
    net = network(seed)
    torch.manual_seed(seed)
    pictures,sounds = torch.randint(3, (5, 16, 16)).byte(),torch.randn(5, 24, 16)
    e,logits = net.evidence(pictures, sounds)
    f = net.features(net.tokens(*net.prepared(pictures, sounds)), Modalities(torch.ones(5), torch.ones(5)))
    rest = f[:, 32:] @ net.decide.weight[:, 32:].T + net.decide.bias
    torch.testing.assert_close(e.sum(1) + rest, logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits, net(pictures, sounds))
    heat = heat_map(e, logits.argmax(1))
    total = heat.sum((1, 2))
    assert (heat >= 0).all() and ((total - 1).abs() < 1e-4).logical_or(total == 0).all()


def test_training_repeats_bit_for_bit(seed):
    g = torch.Generator().manual_seed(seed)
    rule,c = PairingRule(smallest=6, largest=9),SpectrogramConfig(samples=256 + 128*23, bands=16)
    pool = draw_pool(30, rule, c, g)
    def weights():
        torch.manual_seed(seed)
        net = FusionNet(FusionConfig(size=16, frames=24, bands=16, dim=16))
        train_fusion(net, lambda n, g: draw_pieces(n, disc(16)[None], pool, rule, g), FusionSettings(3, 8, seed=seed))
        return torch.cat([p.flatten() for p in net.parameters()])
    assert torch.equal(weights(), weights())


def test_files_are_decoded_as_another_library_does(seed, tmp_path):
    image = pytest.importorskip('PIL.Image')
    r = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(40), 3*np.arange(23)) + r.integers(0, 9, (40, 23)) # smooth enough for all filters
    for pixels in (smooth.astype(np.uint8), r.integers(0, 256, (9, 31), dtype=np.uint8)):
        image.fromarray(pixels).save(out := io.BytesIO(), 'PNG')
        assert (decode_png(out.getvalue()) == pixels).all()
    grey = r.choice(np.array([0, 128, 255], np.uint8), (32, 32))
    image.fromarray(grey).save(tmp_path/'a.png')
    assert (read_picture(tmp_path/'a.png') == grey.astype(int)//127).all()
    image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(out := io.BytesIO(), 'PNG')
    with pytest.raises(ValueError, match='not grey with 8 bits'): decode_png(out.getvalue())
    x,rate = read_wav(write_wav(torch.tensor([.5, -1., .25]), 8000))
    assert rate == 8000 and (x - torch.tensor([.5, -1., .25])).abs().max() < 1e-4


def test_strangeness_is_the_distance_to_the_nearest_class(seed):
    torch.manual_seed(seed)
    labels = torch.randint(3, (600,))
    f = torch.randn(600, 4) @ torch.randn(4, 4) + 5*F.one_hot(labels, 4)
    k = fit_known(f, labels)
    by_hand = [min(float((o - m) @ k.inverse @ (o - m)) for m in k.means) for o in f[:9]]
    torch.testing.assert_close(strangeness(f[:9], k), torch.tensor(by_hand), atol=1e-3, rtol=1e-3)
    assert (strangeness(f[300:], k) > k.limit).sum() == 15 # a twentieth of those that set the limit


def test_the_shipped_inspector_uses_both_and_points_at_the_defect(seed, shipped):
    "On wafers drawn here, which it hasn't seen: better than a perfect reader of one modality, and the heat is at the defect"
    g = torch.Generator().manual_seed(seed)
    rule = PairingRule(weak=5.)
    p = draw_pieces(600, wafers(200, 32, g), draw_pool(300, rule, shipped.spectrogram, g), rule, g, 12)
    right = (shipped.net(p.pictures, p.spectrograms).argmax(1) == p.labels).float().mean()
    assert right > max(rule_ceilings(rule).values()) + .05
    e,logits = shipped.net.evidence(p.pictures, p.spectrograms)
    found = (p.labels > 0) & (logits.argmax(1) > 0)
    heat,near = heat_map(e, logits.argmax(1))[found],F.max_pool2d(p.where[found][:, None].float(), 5, 1, 2)[:, 0]
    assert (heat*near).sum((1, 2)).mean() > 3*near.mean()
    folder = ROOT/'deepseek_nb'/'inspector'
    assert sum(o.stat().st_size for o in folder.iterdir()) < 2*2**20 and 'synthetic' in (folder/'README.md').read_text()


def test_bad_input_is_one_line_and_changes_nothing(shipped):
    x,m = torch.randn(6272),disc(32)
    before = shipped.inspect(m, x, 12_000)
    bad = {'32 x 32 are needed': (disc(31),), 'has two axes': (m[None],), 'NaN or infinity': (torch.full((32, 32), math.nan),),
           'states are 0': (m*3,), 'no die': (0*m,), 'give the rate': (m, x), 'recording is empty': (m, [], 12_000),
           '44100 samples a second': (m, x, 44_100), '6271 samples, but 6272': (m, x[1:], 12_000), 'not finite': (m, x/0, 12_000),
           'one axis': (m, x[None], 12_000), 'sensor connected': (None, 0*x, 12_000), 'nothing to read': (), 'no PNG': (b'GIF89a',),
           'no WAV file': (None, b'RIFF')}
    for message,args in bad.items():
        with pytest.raises(ValueError, match=message) as e: shipped.inspect(*args)
        assert '\n' not in str(e.value)
    after = shipped.inspect(m, x, 12_000)
    assert before.probabilities == after.probabilities and torch.equal(before.heat, after.heat)


def test_restored_inspectors_have_the_same_bits(seed, shipped, tmp_path):
    shipped.save(tmp_path)
    again,g = Inspector.load(tmp_path),torch.Generator().manual_seed(seed)
    p = draw_pieces(9, wafers(9, 32, g), draw_pool(9, PairingRule(), shipped.spectrogram, g), PairingRule(), g)
    for i in range(9):
        for args in ((p.pictures[i:i+1], p.spectrograms[i:i+1]), (p.pictures[i:i+1], None), (None, p.spectrograms[i:i+1])):
            a,b = shipped.decide(*args),again.decide(*args)
            assert (a.probabilities, a.strangeness, a.unknown) == (b.probabilities, b.strangeness, b.unknown)


def test_the_command_scores_a_folder(seed, shipped, tmp_path):
    image = pytest.importorskip('PIL.Image')
    g = torch.Generator().manual_seed(seed)
    (tmp_path/'in').mkdir()
    for name in 'ab':
        image.fromarray(wafers(1, 32, g)[0].numpy()).save(tmp_path/'in'/f'{name}.png')
        (tmp_path/'in'/f'{name}.wav').write_bytes(write_wav(torch.randn(6272), 12_000))
    (tmp_path/'in'/'b.png').unlink()
    score_file('inspect', f'{tmp_path}/in', f'{tmp_path}/out.jsonl')
    rows = [json.loads(o) for o in (tmp_path/'out.jsonl').read_text().splitlines()]
    one = shipped.inspect(tmp_path/'in'/'a.png', tmp_path/'in'/'a.wav')
    assert [Path(r['piece']).name for r in rows] == ['a.png', 'b.wav'] and rows[0]['cause'] == one.cause in CAUSES
    assert 'pairing' in find_app('inspect').card('')


def test_the_study_has_its_plan_and_its_finding_follows_from_the_records():
    plan,records,study = read_plan(ROOT/'nbs/configs/evidence/inspect.toml'),runs('inspect'),open_study('inspect')
    assert {r['arm'] for r in records} <= {*plan.arms} and {'control', 'constant', 'logistic'} <= {*plan.arms}
    assert len(to_do(plan, records)) == len(plan.arms)*len(plan.seeds) - len(records) # no record of other settings
    made = [dict(arm=a, seed=0, result=dict(value=v)) for a,v in (('cross', .75), ('picture', .5), ('vibration', .6), ('control', .5))]
    assert '**missed in the runs so far**' in study.finding(made)
    better = [dict(made[0], seed=i, result=dict(value=.77)) for i in range(3)]
    assert '**reached**' in study.finding([*made[1:], *better]) and 'so far**' in study.finding([*made[1:3], *better])
    assert 'Not run yet' in study.finding(made[:2]) and 'control has not been run' in study.finding(made[:3])
