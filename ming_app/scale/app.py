"""`build`: the Ray Serve application: the page and the API (`Front`) before replicas of the engine (`EngineReplica`).

`serve run` reads it from a file: examples/scale/serve.yaml. `args` are settings by name (ming_app/settings.py); replicas, machines
and the adapter that is served are the business of the file's `deployments`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from ming_app.scale.replica import EngineReplica, cluster_settings

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
NAME = "EngineReplica"
MAX_REPLICAS = 4
FRONT_REQUESTS = 1000  # HTTP requests that the front has under way: the page holds one open for every visitor
QUIET = {"enable_access_log": False}


def build(args: dict[str, Any]) -> Application:
    """`max_replicas` among the arguments: how far engines may grow, which bounds what the front lets in. Raises UsageError."""
    given = dict(args)
    most = int(given.pop("max_replicas", MAX_REPLICAS))
    settings = cluster_settings(given)
    waiting = min(settings.streams, settings.max_queue)
    by_session = RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": most})
    replica = serve.deployment(EngineReplica).options(
        name=NAME,
        user_config={},
        max_ongoing_requests=settings.streams + waiting,  # a full one passes the next request on
        max_queued_requests=settings.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=1, max_replicas=most, target_ongoing_requests=settings.streams, downscale_delay_s=300
        ),
        request_router_config=by_session,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        logging_config=QUIET,
    )
    seen = {
        "progress": "browser",  # Serve listens, and these settings do not know to whom
        **given,
        "streams": min(settings.streams * most, 256),
        "max_queue": min(waiting * most + settings.max_queue, 100_000),
    }

    def front() -> Any:
        from ming_app.scale.remote import RemoteEngine
        from ming_app.serve.app import build_app
        from ming_app.ui.loader import EngineLoader

        here = cluster_settings(seen)
        handle = serve.get_deployment_handle(NAME)
        loader = EngineLoader(lambda progress: RemoteEngine.connect(handle, here.per_visitor, progress))
        app = build_app(loader, here)
        loader.start()
        return app

    page = serve.deployment(
        serve.ingress(front)()
    ).options(
        name="Front",
        num_replicas=1,
        max_ongoing_requests=FRONT_REQUESTS,
        request_router_config=by_session,  # by the header x-session-id, which the page needs where there are several fronts
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return page.bind(replica.bind(given))
