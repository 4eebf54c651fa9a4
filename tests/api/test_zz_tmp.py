import time, tempfile, json
from pathlib import Path
def test_x(launch, tiny_model):
    from tests.conftest import tiny_config, TINY_MODEL
    from tests.api.fuzzing import Attacker, REQUESTS
    import httpx
    live = launch(config=tiny_config(tiny_model, ""), env={"TUFT_ENGINE__NUM_THREADS": "1"})
    r = httpx.get(live.url + "/openapi.json"); print(r.status_code)
    print(live.log.read_text()[-3000:])
    with httpx.Client(base_url=live.url, headers={"X-API-Key": live.key}, timeout=60) as client:
        import tests.api.fuzzing as f; old=f.replaced; f.replaced=lambda v,p,n: v if p==("zzz",) else old(v,p,n)
        a = Attacker(client, TINY_MODEL, 2**20); a.begin()
        for label in REQUESTS:
            t = time.perf_counter()
            for _ in range(5): a.json(label, ("zzz",), 1)
            print(label, (time.perf_counter()-t)/5*1000)
        print(a.statuses, a.faults)
