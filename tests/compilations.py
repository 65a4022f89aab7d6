"""Counts what jax compiles."""

import jax


class count_compilations:
    """Collects the names of programs that jax compiles."""

    def __enter__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self.names

    def _heard(self, event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(details.get("fun_name", event))

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._heard)
