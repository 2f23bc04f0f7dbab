"""The example files of a deployment: what they say is what the command line, the server and the repository have."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import yaml

from deepseek_nb.serve.app import Server
from deepseek_nb.serve.logs import EngineMetrics
from deepseek_nb.tools.cli import VERBS
from deepseek_nb.tools.serving import read_settings

ROOT = Path(__file__).parents[1]
UNIT, CONTAINER = (ROOT/'nbs'/'examples'/name for name in ('deepseek-nb.service', 'Containerfile'))


def unit_value(name):
    "A setting that stands in the unit once"
    value, = re.findall(rf'^{name}=(.*)$', UNIT.read_text(), re.M)
    return value


def container_command(): return sum((json.loads(v) for v in re.findall(r'^(?:ENTRYPOINT|CMD) (\[.*\])$', CONTAINER.read_text(), re.M)), [])


@pytest.mark.parametrize('words', [shlex.split(unit_value('ExecStart')), container_command()], ids=['unit', 'container'])
def test_commands(words):
    "The verb and the options are those of the command line"
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[0].rpartition('/')[2] == 'deepseek-nb' and words[1] == 'serve'
    assert options == {'--config': '/etc/deepseek-nb/server.toml', '--log-format': 'json'}
    assert {o.removeprefix('--').replace('-', '_') for o in options} <= signature(VERBS['serve']).parameters.keys()


def test_settings():
    "They are read as they are; the time until SIGKILL is longer than the drain, in both files."
    models, config, engine = read_settings(ROOT/'nbs/examples/server.toml')
    seconds = [int(unit_value('TimeoutStopSec')), int(re.search(r'--stop-timeout (\d+)', CONTAINER.read_text())[1])]
    assert models and config.keys and config.log_format == 'json' and not config.log_prompts and min(seconds) > config.drain + 5
    assert engine['folder'].startswith('/var/cache/' + unit_value('CacheDirectory'))
    assert f'EXPOSE {config.port}' in CONTAINER.read_text() and f'127.0.0.1:{config.port}/health' in CONTAINER.read_text()


def test_container():
    "Instructions that exist, sources that exist, no root, and a health check of a route that exists."
    text = re.sub(r'\\\n', ' ', re.sub(r'^#.*\n', '', CONTAINER.read_text(), flags=re.M))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    known = {'FROM', 'RUN', 'COPY', 'USER', 'ENV', 'VOLUME', 'EXPOSE', 'STOPSIGNAL', 'HEALTHCHECK', 'ENTRYPOINT', 'CMD'}
    assert {word for word, _ in lines} == known and lines[0][0] == 'FROM'
    names = [word for word, _ in lines]
    sources = [o for word, rest in lines if word == 'COPY' for o in rest.split()[:-1]]
    assert 'pyproject.toml' in sources and all((ROOT/o).exists() for o in sources)
    made = re.search(r'useradd .*?--uid (\d+).* (\S+) &&', text)
    assert int(made[1]) > 0 and dict(map(tuple, lines))['USER'] == made[2] and names.index('USER') < names.index('ENTRYPOINT')
    assert '/health' in [r.path for r in Server([]).routes()]
    assert '"/src[serve]"' in text and re.search(r'^serve = \[', (ROOT/'pyproject.toml').read_text(), re.M)


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='systemd-analyze is not installed')
def test_unit(tmp_path):
    "systemd itself reads the unit, and finds little that it may do."
    text = UNIT.read_text().replace(unit_value('ExecStart').split()[0], sys.executable)
    (path := tmp_path/UNIT.name).write_text(text)
    done = subprocess.run(['systemd-analyze', 'verify', '--man=no', '--generators=no', path], capture_output=True, text=True, timeout=60)
    assert not [line for line in done.stderr.splitlines() if UNIT.name in line], done.stderr
    done = subprocess.run(['systemd-analyze', 'security', '--offline=true', path], capture_output=True, text=True, timeout=60)
    assert float(re.search(r'exposure level for \S+: ([\d.]+)', done.stdout)[1]) < 3, done.stdout


@pytest.fixture
def cluster(): return {o['kind']: o for o in yaml.safe_load_all((ROOT/'nbs/examples/kubernetes.yaml').read_text())}


def test_kubernetes(cluster):
    "The pod has the image's command, the routes of the server, a volume for each place that is written, and the time to drain"
    pod = cluster['Deployment']['spec']['template']['spec']
    box, = pod['containers']
    assert box['args'] == container_command()[2:]
    assert box['ports'][0]['containerPort'] == read_settings(ROOT/'nbs/examples/server.toml')[1].port
    routes = {r.path for r in Server([]).routes()}
    assert {box[f'{kind}Probe']['httpGet']['path'] for kind in ('startup', 'readiness', 'liveness')} == {'/ready', '/health'} <= routes
    mounts, volumes = {m['name']: m['mountPath'] for m in box['volumeMounts']}, {v['name'] for v in pod['volumes']}
    assert mounts.keys() == volumes and {'/tmp', re.search('VOLUME (.*)', CONTAINER.read_text())[1]} < {*mounts.values()}
    drain = read_settings(ROOT/'nbs/examples/server.toml')[1].drain
    assert pod['terminationGracePeriodSeconds'] > box['lifecycle']['preStop']['sleep']['seconds'] + drain + 5
    assert pod['securityContext']['runAsUser'] == int(re.search(r'--uid (\d+)', CONTAINER.read_text())[1])
    labels = cluster['Deployment']['spec']['template']['metadata']['labels']
    for kind in ('Service', 'PodDisruptionBudget'):
        chosen = cluster[kind]['spec']['selector']
        assert chosen.get('matchLabels', chosen) == cluster['Deployment']['spec']['selector']['matchLabels'] == labels
    target = cluster['HorizontalPodAutoscaler']['spec']['scaleTargetRef']
    assert (target['kind'], target['name']) == ('Deployment', cluster['Deployment']['metadata']['name'])
    metric, = cluster['HorizontalPodAutoscaler']['spec']['metrics']
    name = metric['pods']['metric']['name'].removeprefix('vllm_')
    assert f'vllm:{name}' in EngineMetrics({}).text()


def test_the_schema_of_kubernetes(cluster):
    "Each object is one of Kubernetes, and a misspelt field is none: pip install kubernetes-validate"
    validate = pytest.importorskip('kubernetes_validate', reason='pip install kubernetes-validate')
    for found in cluster.values(): validate.validate(found, '1.35', strict=True)
    cluster['Deployment']['spec']['replica'] = 2
    with pytest.raises(validate.ValidationError): validate.validate(cluster['Deployment'], '1.35', strict=True)
