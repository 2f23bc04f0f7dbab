"Routes: loaders and rounding, C++ against Python, locked stops, the network against its definition, the service, the study"
import math
import random
import threading
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch

from deepseek_nb.apps.command import AppServer
from deepseek_nb.apps.route import (
    Order,
    RouteApp,
    RouteConfig,
    RouteNet,
    Router,
    alone_feasible,
    as_instance,
    canonical,
    construct_in_python,
    construct_routes,
    follow,
    make_lesson,
)
from deepseek_nb.apps.route_moves import (
    METRICS,
    Instance,
    checked_cost,
    distances,
    improve,
    join_by_savings,
    nearest_neighbour,
    nearest_places,
    prepare_roads,
    random_instance,
    read_instance,
    read_solution,
    route_times,
)
from deepseek_nb.core.dispatch import use
from deepseek_nb.serve.app import ServerConfig
from deepseek_nb.studies import open_study, read_plan, runs, to_do
from deepseek_nb.tools.cli import main

KINDS = 'tsp', 'cvrp', 'vrptw'


@pytest.fixture(scope='module')
def seed():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return n


# ---- problems

def test_rounding_of_each_family():
    "Against the formulas of TSPLIB, one pair at a time"
    r = random.Random(1)
    xy = torch.tensor([[r.uniform(0, 90), r.uniform(0, 90)] for _ in range(12)], dtype=torch.float64)
    got = {m: distances(xy, m) for m in METRICS}
    for i in range(12):
        for j in range(12):
            d = math.hypot(*(xy[i] - xy[j]).tolist())
            root = d/math.sqrt(10)
            want = dict(nearest=math.floor(d + .5), up=math.ceil(d), att=round(root) + (round(root) < root), tenth=math.floor(10*d))
            assert {m: got[m][i, j].item() for m in want} == want
    assert (got['geo'] == got['geo'].T).all() and (got['geo'].diag() == 0).all()


def brute(o, routes):
    "Cost of routes and whether they are feasible, by a slow loop of its own"
    if sorted(c for r in routes for c in r) != list(range(1, len(o.xy))): return None
    cost = 0
    for r in routes:
        if o.capacity >= 0 and sum(o.demand[c].item() for c in r) > o.capacity: return None
        time = 0 if o.windows is None else o.windows[0, 0].item()
        for a, b in zip([0, *r], [*r, 0], strict=True):
            d = o.distance[a, b].item()
            cost += d
            if o.windows is not None:
                time = max(time + o.windows[a, 2].item() + d, o.windows[b, 0].item())
                if time > o.windows[b, 1].item(): return None
    return cost


@pytest.mark.parametrize('kind', KINDS)
def test_judge_against_a_slow_loop(seed, kind):
    r = random.Random(seed)
    for i in range(20):
        o = random_instance(kind, 9, seed + i)
        order = r.sample(range(1, 9), 8)
        cut = 8 if kind == 'tsp' else r.randint(1, 4)
        routes = [order[j:j+cut] for j in range(0, 8, cut)]
        try: got = checked_cost(o, routes)
        except ValueError as e: got = None; assert '\n' not in str(e)
        assert got == brute(o, routes)
    for bad in ([[1, 2, 3, 4, 5, 6, 7]], [[1, 1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, 6, 7, 8, 9]]):
        with pytest.raises(ValueError, match='not every customer is visited once'): checked_cost(o, bad)


def test_files(tmp_path):
    text = '\n'.join(['NAME : w', 'EDGE_WEIGHT_TYPE : EUC_2D', 'CAPACITY : 9', 'SERVICE_TIME : 2', 'NODE_COORD_SECTION', '1 0 0', '2 3 4.5',
                      'DEMAND_SECTION', '1 0', '2 3', 'TIME_WINDOW_SECTION', '1 0 50', '2 6 20', 'DEPOT_SECTION', '1', '-1', 'EOF'])
    (tmp_path/'w.vrp').write_text(text)
    o = read_instance(tmp_path/'w.vrp')
    assert (o.kind, o.distance[0, 1].item(), o.windows.tolist()) == ('vrptw', 54, [[0, 500, 0], [60, 200, 20]])
    assert route_times(o, [1]) == [60, 134]
    (tmp_path/'w.sol').write_text('Route #1: 1\nCost 10.8\n')
    assert read_solution(tmp_path/'w.sol') == ([[1]], 10.8)


# ---- search

@pytest.mark.parametrize('kind', KINDS)
def test_python_and_cpp_find_equal_routes(seed, kind):
    draw = random.Random(seed)
    for i in range(2):
        o = random_instance(kind, draw.choice([4, 9, 22]), seed + i)
        locked = [c for r in join_by_savings(prepare_roads(o)) for c in r[:draw.randint(0, 2)]]
        start = join_by_savings(prepare_roads(o))
        roads = prepare_roads(o, locked)
        with use('reference'): slow = (nearest_places(roads.distance, 9), start, improve(roads, start, rounds=8, seed=seed))
        with use('cpp'): fast = (nearest_places(roads.distance, 9), join_by_savings(roads), improve(roads, start, rounds=8, seed=seed))
        assert slow[0].equal(fast[0]) and slow[1:] == fast[1:]
        assert brute(o, fast[2].routes) == fast[2].cost <= brute(o, start)


@pytest.mark.parametrize('kind', KINDS)
def test_search_keeps_locked_stops_and_feasibility(seed, kind):
    o = random_instance(kind, 60, seed)
    for start in (nearest_neighbour(o), join_by_savings(prepare_roads(o)), []):
        found = improve(prepare_roads(o), start, rounds=60, seed=seed)
        assert brute(o, found.routes) == found.cost
    locked = {tuple(r[:k]) for k, r in enumerate(found.routes) if 0 < k < len(r)}
    again = improve(prepare_roads(o, [c for r in locked for c in r]), found.routes, rounds=200, seed=seed)
    assert brute(o, again.routes) == again.cost <= found.cost
    assert all(any(tuple(r[:len(p)]) == p for r in again.routes) for p in locked)


def test_small_tours_are_optimal(seed):
    from itertools import permutations
    o = random_instance('tsp', 8, seed)
    best = min(brute(o, [p]) for p in permutations(range(1, 8)))
    assert improve(prepare_roads(o), [], rounds=300).cost == best


def test_a_time_limit_leaves_feasible_routes(seed):
    o = random_instance('vrptw', 80, seed)
    for seconds in (0, 1e-4, 3e-3):
        for start in ([], nearest_neighbour(o)): assert brute(o, improve(prepare_roads(o), start, seconds).routes) is not None


# ---- the network

@pytest.mark.parametrize('kind', KINDS)
def test_pointer_in_cpp_constructs_the_same(seed, kind):
    torch.manual_seed(seed)
    net = RouteNet(RouteConfig(dim=16, heads=2, layers=1)).eval()
    for i in range(2):
        o = random_instance(kind, 16, seed + i)
        routes = construct_in_python(net, o)
        assert construct_routes(net, o) == routes and brute(o, routes) is not None
        steps = follow(o, canonical(o, routes) if kind != 'tsp' else routes)
        assert steps.allowed.gather(1, steps.chosen[:, None]).all()


def test_trained_weights_beat_an_untrained_network():
    net, held = RouteNet.load(), [random_instance(k, 40, 77_000 + i) for i in range(3) for k in KINDS[:2]]
    torch.manual_seed(0)
    fresh = RouteNet().eval()
    def total(n): return sum(checked_cost(o, construct_routes(n, o))/checked_cost(o, nearest_neighbour(o)) for o in held)
    assert total(net) < min(total(fresh), len(held))
    assert Path(open_study('route').__spec__.origin).exists()


def test_a_turned_tour_has_the_same_length(seed):
    o = random_instance('tsp', 12, seed)
    lesson = make_lesson(o, [random.Random(seed).sample(range(1, 12), 11)], torch.Generator().manual_seed(seed))
    assert sorted(lesson.steps.chosen.tolist()) == list(range(1, 12))


# ---- the service

def orders(seed, n, windows=False):
    r = random.Random(seed)
    def one(i):
        x, y, ready = r.uniform(0, 100), r.uniform(0, 100), r.uniform(0, 200)
        return Order(f'{i}', x, y, r.uniform(.1, 5), *((ready, ready + 150 + r.uniform(0, 99), 3.) if windows else ()))
    return [one(i) for i in range(n)]


def check(router):
    ids = [*router.orders]
    o = as_instance([*router.orders.values()], router.depot, router.capacity, router.close)
    return brute(o, [[ids.index(k) + 1 for k in r] for r in router.routes])


@pytest.mark.parametrize('windows', [False, True])
def test_a_day_of_orders(seed, windows, tmp_path):
    "Orders arrive, are reached and cancelled; routes stay feasible, and a restart changes nothing"
    r, new = random.Random(seed), orders(seed, 40, windows)
    router = Router((50, 50), 12.5, 900 if windows else None)
    assert router.plan(new[:25], rounds=5).length == check(router)/1000
    for i, o in enumerate(new[25:]):
        before = [[k for k in q if k in router.locked] for q in router.routes]
        router.save(tmp_path/'state.json')
        other = Router.load(tmp_path/'state.json')
        assert router.add(o, rounds=3) == (again := other.add(o, rounds=3)) or router.routes == again.routes
        assert check(router) is not None and all(not p or any(q[:len(p)] == p for q in router.routes) for p in before)
        q = r.choice(router.routes)
        if i % 3 == 0 and (ahead := [k for k in q if k not in router.locked]): router.reached(ahead[0])
        if i % 5 == 0 and (free := [k for k in router.orders if k not in router.locked]): router.cancel(r.choice(free), rounds=2)
    assert check(router) is not None


@pytest.mark.parametrize('change, said', [
    (dict(x=math.nan), 'x is nan'), (dict(y=math.inf), 'y is inf'), (dict(demand='4'), "demand is '4'"),
    (dict(demand=-1), 'not be negative'),
    (dict(demand=13), 'above the capacity'), (dict(id='3'), 'already'), (dict(id=''), 'text that is not empty'),
    (dict(ready=0., due=1.), "can't be there before"),
    (dict(ready=9., due=5.), 'before it begins'), (dict(service=999.), 'is back at'), (dict(x=1e9, due=None), 'is back at')])
def test_bad_orders_lose_nothing(change, said):
    router = Router((50, 50), 12.5, 900)
    router.plan(orders(0, 6), rounds=1)
    before = router.routes, {**router.orders}, router.seed
    bad = Order(**{**asdict(Order('new', 90, 90, 2, 10, 200, 1)), **change})
    for call in (lambda: router.add([Order('good', 1, 1), bad]), lambda: router.add(bad)):
        with pytest.raises(ValueError, match=said) as e: call()
        assert '\n' not in str(e.value) and (router.routes, router.orders, router.seed) == before
    for call, why in ((lambda: router.cancel('no'), "no order 'no'"), (lambda: router.reached('no'), "no order 'no'")):
        with pytest.raises(ValueError, match=why): call()


def test_limits_in_thousandths():
    far = Order('far', 3, 4, 1.0004, 0, 5.0001, 0)
    assert alone_feasible(as_instance([far], (0, 0), 2, 10.001)).all()
    assert not alone_feasible(as_instance([far], (0, 0), 1.0004, 10.001)).all()
    router = Router((0, 0), 1.0004)
    with pytest.raises(ValueError, match='in thousandths'): router.plan([far])
    assert Router((0, 0)).plan([]).routes == []
    assert Router((0, 0)).plan([Order('a', 0, 0), Order('b', 0, 0)], rounds=3).length == 0


def test_deadlines_are_met_or_said(seed):
    router = Router((50, 50), 12.5, net=RouteNet.load())
    for deadline in (1e-4, .01):
        plan = router.plan(orders(seed, 50), deadline)
        assert check(router) is not None and plan.late == (plan.seconds > deadline)


def test_answers_over_http_are_feasible_and_say_whether_they_are_late(seed):
    "A client over a real socket; its own clock includes the service's"
    study, ready, deadline = open_study('route'), threading.Event(), .02
    server = AppServer(dict(route=RouteApp.serve('', capacity=100.)), ServerConfig(port=0, log_format='off'))
    thread = threading.Thread(target=server.run, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(60)
    link = HTTPConnection('127.0.0.1', server.address[1], timeout=60)
    for i in range(3):
        *known, new = study.some_orders(101, seed + i)
        for body, now in ((dict(do='plan', orders=known), known), (dict(do='add', orders=[new]), [*known, new])):
            answer, waited = study.ask(link, **body, seconds=deadline)
            in_time = study.client_checks(answer, now, 100, deadline)
            assert in_time == (answer['seconds'] <= deadline) and answer['seconds'] <= waited
        assert study.ask(link)[0]['routes'] == answer['routes']
    refused, _ = study.ask(link, do='add', orders=[dict(new, id='huge', demand=101)])
    assert 'above the capacity' in refused['error']['message'] and study.ask(link)[0]['routes'] == answer['routes']
    link.close()
    server.uvicorn.should_exit = True
    thread.join(60)


def test_application(tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    rows = ['1 0 0', '2 0 9', '3 9 9', '4 9 0', '5 4 4', '6 1 7', '7 2 2', '8 7 3', '9 5 8', '10 8 6', '11 3 6', '12 6 1']
    (folder/'a.tsp').write_text('NAME : a\nEDGE_WEIGHT_TYPE : EUC_2D\nNODE_COORD_SECTION\n' + '\n'.join(rows) + '\nEOF\n')
    scored, = RouteApp.score([dict(file=str(folder/'a.tsp'))], '')
    assert scored['name'] == 'a' and scored['cost'] == checked_cost(read_instance(folder/'a.tsp'), eval(scored['routes']))
    assert 'loss of a decision' in RouteApp.train(folder, tmp_path/'out', problems=8, steps=2)
    table = [dict(id=float(i), x=float(i), y=1., demand=2.) for i in range(5)]
    assert len({o['route'] for o in RouteApp.score(table, str(tmp_path/'out'), capacity=4.)}) == 3
    assert '# Routes' in RouteApp.card('')


@pytest.mark.parametrize('text, said', [
    ('id,x,y\n1,2,3\n2,,3\n', ', row 2: x is missing; an order needs id, x and y'), ('id,x\n1,2\n', ', row 1: y is missing'),
    ('x,y\n1,2\n', ', row 1: id is missing'), ('id,x,y\n1,a,2\n2,3,4\n', ": order '1': x is 'a'")])
def test_orders_that_lack_something(text, said, tmp_path, capsys):
    (tmp_path/'orders.csv').write_text(text)
    assert main(['app', 'route', 'score', f'{tmp_path}/orders.csv']) == 2
    assert capsys.readouterr().err.startswith(f'deepseek-nb: {tmp_path}/orders.csv{said}')


def test_options_and_weights_that_are_none(tmp_path, capsys):
    (tmp_path/'orders.csv').write_text('id,x,y\n1,2,3\n')
    assert main(['app', 'route', 'score', f'{tmp_path}/orders.csv', '--options', 'x=abc']) == 2
    assert capsys.readouterr().err == "deepseek-nb: option 'x' is 'abc'; it must be a number\n"
    assert main(['app', 'route', 'card', '--weights', f'{tmp_path}/none']) == 2
    assert 'none: no such folder' in capsys.readouterr().err
    RouteNet().save(tmp_path/'model.safetensors')
    assert main(['app', 'route', 'card', '--weights', str(tmp_path)]) == 0 and f'the weights are in {tmp_path}' in capsys.readouterr().out


# ---- the study

def test_study():
    study, root = open_study('route'), Path(__file__).parents[1]
    plan, records = read_plan(root/'nbs/configs/evidence/route.toml'), runs('route', root/'nbs/results/evidence')
    assert {(r['arm'], r['seed']) for r in records} <= {(a, s) for a in plan.arms for s in plan.seeds}
    assert len(to_do(plan, records)) == len(plan.arms)*len(plan.seeds) - len(records), 'records of other settings'
    for r in records:
        for o in r['result']['instances'].values():
            assert all(row['cost'] is None or row['cost'] >= o['best'] for row in o['rows'])
    assert study.finding(records)


@pytest.mark.parametrize('kind', KINDS)
def test_baselines_solve_the_same_problem(kind):
    pytest.importorskip('pyvrp')
    pytest.importorskip('ortools')
    study, o = open_study('route'), random_instance(kind, 10, 5)
    best = improve(prepare_roads(o), [], rounds=400).cost
    for solve in (study.pyvrp_routes, study.ortools_routes):
        routes, _ = solve(o, .1, 0)
        assert routes is None or best <= brute(o, routes) <= 1.3*best


def test_infinite_coordinates_are_refused():
    with pytest.raises(ValueError, match='too large'): distances(torch.tensor([[0, 0], [1e12, 0.]]))
    assert Instance('one', torch.zeros(1, 2)).kind == 'tsp'
