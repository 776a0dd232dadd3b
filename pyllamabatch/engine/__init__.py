"""The engine: many requests on one shared context, and the only room with threads.

A request's way:

    submit -> InputProcessor -> CommandQueue -> EngineCore.step()
           -> ring -> OutputProcessor -> Stream

`EngineCore.step()` takes commands, schedules, carries out KV operations, runs and updates. It
knows one kind of `Request`; the request's `Sink` hears what becomes of it: a `StreamSink`, or the
`InteractiveSink` of a `Sequence`."""
