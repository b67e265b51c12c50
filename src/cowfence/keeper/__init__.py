"""The keeper: a small process that completes a killed writer's work (crash contract, clause C4 and "Keeper").

``start`` is the writer's side: the shared memory, and the process started and watched. ``__main__`` is the process itself.
"""
