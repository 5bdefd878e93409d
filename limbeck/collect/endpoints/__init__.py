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
stage        what the stage `collect` calls
"""
