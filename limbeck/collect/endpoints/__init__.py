"""Teachers behind endpoints, asked over HTTP.

teacher      what is asked for a prompt, and what an answer says
dialects     what differs between the APIs
openai_chat  OpenAI's chat completions
openai_responses  OpenAI's responses
anthropic    Anthropic's messages
reply        JSON looked at without trust
keys         the key, from the environment or a file into a header
waits        Retry-After and quota headers
fates        what becomes of a reply: data, sent again, or a reason to stop
prices       what tokens cost
budget       the cap on money
pacing       how fast: numbers under way, rates, pauses, the circuit
gate         where requests wait for the pacing
transport    one request over HTTP
sending      all requests, until they are answered or something says to stop
reasons      why it stopped, in words
status       what the terminal shows
asking       opens what is needed, and sends
account      what it cost and what was wasted
batch_raw    how an answer that came in a batch lies in the journal
batch_http   uploads, questions, results line by line
batch_apis   what differs between the providers' batches
batch_log    what the journal knows of batches
batch_calls  asks until there is an answer, and has a batch created once
batch_results  takes results into the journal
batch_status what the terminal shows of batches
batching     plans batches, and carries each to its end
batch_asking opens what is needed, and has batches made
stage        what the stage `collect` calls
"""
