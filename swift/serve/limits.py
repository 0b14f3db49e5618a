"""How long and how much a client may ask of the server before it is turned away. Options of ``swift deploy`` set the rest."""

HEAD_TIMEOUT_S = 20.0  # for the head of a request
BODY_TIMEOUT_S = 60.0  # for the whole body
WRITE_TIMEOUT_S = 30.0  # in which a client takes nothing of an answer
MOST_HEAD_BYTES = 2**16
READ_AND_FORGOTTEN = 4  # times the largest body: a client that is still writing would not see the answer
MOST_HELD = 32  # times the largest body: bodies of all requests that are under way
LONG_BODY_BYTES = 2**14  # from here on a request is made ready in a thread, so that others are answered meanwhile
MOST_BEHIND = 1024  # pieces of an answer that wait for a client which reads more slowly than the engine writes

MOST_DEPTH = 64  # levels of lists and objects in a schema, or in whatever has no fixed form
MOST_VALUES = 50_000  # values in it
MOST_PROMPTS = 2048  # of one request
MOST_CHARACTERS = 2**21  # of a text that is made tokens: some 200 bytes of memory each
MOST_EMBEDDED_TOKENS = 2048  # of the texts that the engine embeds between two steps of others' answers

MOST_GRAMMAR_BYTES = 2**18
GRAMMAR_TIMEOUT_S = 2.0  # for compiling it
GRAMMAR_MEMORY_BYTES = 2**30

MOST_IMAGES = 16  # of a request, unless --limit_mm_per_prompt says another number
LOW_DETAIL_PIXELS = 512  # each way, of an image with "detail": "low"
MOST_IMAGE_REQUESTS = 32  # with images that wait to be made ready, by one thread
MOST_MEDIA_BYTES = 2**30  # of images that are ready, of all requests that are under way
