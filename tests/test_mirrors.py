"""Mirrors to programs that are installed for real: MLflow with a SQLite store, and OpenTelemetry's SDK with its reader in memory.

    pip install mlflow opentelemetry-sdk && pytest tests/test_mirrors.py"""
import pytest
from sqlalchemy import insert

from deepseek_nb.platform.events import Recorder, RequestEvent, total, windows_of
from deepseek_nb.platform.jobs import job_kind, submit
from deepseek_nb.platform.operator import mirror_window
from deepseek_nb.platform.runs import mirror_run
from deepseek_nb.platform.store import curves, jobs, open_store


@pytest.fixture
def ended(tmp_path):
    "A store with a job that has ended, its curve and its measures"
    store = open_store(tmp_path/'store', durable=False)
    job_kind('mirrored')(lambda job: {})
    job = submit(store, None, 'mirrored', dict(rate=.003, words='x'*700), name='one')
    at = store.now()
    with store.write() as c:
        c.execute(jobs.update().values(state='done', started=at, ended=at, result=dict(measures=dict(accuracy=.75))))
        c.execute(insert(curves), [dict(job_id=job, name='loss', step=s, value=4 - s/1000, at=at) for s in range(2500)])
    yield store, job
    store.close()


def test_mlflow(ended, tmp_path):
    "Settings, tags, all points of a curve that needs several batches, and measures, as MLflow reads them back"
    mlflow = pytest.importorskip('mlflow', reason='MLflow is not installed (pip install mlflow)')
    uri = f'sqlite:///{tmp_path}/mlflow.db'
    run = mirror_run(*ended, uri)
    client = mlflow.MlflowClient(uri)
    found = client.get_run(run)
    assert found.info.status == 'FINISHED' and found.info.run_name == 'one' and found.data.tags['kind'] == 'mirrored'
    assert found.data.params == dict(rate='0.003', words='x'*500) and found.data.metrics['accuracy'] == .75
    points = client.get_metric_history(run, 'loss')
    assert sorted((p.step, p.value) for p in points) == [(s, 4 - s/1000) for s in range(2500)]
    again = mirror_run(*ended, uri)
    assert again != run and len(client.search_runs([found.info.experiment_id])) == 2


def test_opentelemetry(tmp_path):
    "Counters add up over windows, and latencies become a histogram"
    pytest.importorskip('opentelemetry.sdk', reason="OpenTelemetry's SDK is not installed (pip install opentelemetry-sdk)")
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    store = open_store(tmp_path, durable=False)
    with Recorder(store) as r:
        for i in range(10): r.record(RequestEvent('a', seconds=1. + i, prompt_tokens=5, error='x'*(i == 0)))
    row = total(windows_of(store, 'a', 0))
    assert mirror_window(row) and mirror_window(row)
    got = {m.name: m.data.data_points for r in reader.get_metrics_data().resource_metrics for s in r.scope_metrics for m in s.metrics}
    assert [p.value for p in got['deepseek_nb.count']] == [20] and [p.value for p in got['deepseek_nb.prompt_tokens']] == [100]
    assert [p.value for p in got['deepseek_nb.errors']] == [2] and dict(got['deepseek_nb.count'][0].attributes) == dict(place='a')
    assert {p.attributes['quantile']: p.count for p in got['deepseek_nb.seconds']} == {.5: 2, .99: 2}
    store.close()
