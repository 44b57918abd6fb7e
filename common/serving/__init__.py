"""HTTP around an engine: bodies in, JSON or events out. The only room that knows Flask; torch is not imported here.

In reading order:

server             waitress: limits, and an end that lets answers finish
app                the service's life and routes, who may use them; a request becomes an answer, whole or as events
failures           what a client is told where it gets none
middleware         around every request: id, log line, counts
validation         bodies, read strictly
openai_messages    OpenAI's messages and tools as turns
openai_requests    OpenAI's bodies as what the engine is asked
openai_responses   its parts as OpenAI's choices and chunks
text_generate      the fields of POST /nlg/text_generate
adapters           several adapters over one base
openapi            the document of all this
tracing            OpenTelemetry, where it is installed
pages/             the chat page and the documentation page
"""
