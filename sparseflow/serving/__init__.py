"""Text over HTTP: an OpenAI-compatible server whose workers, processes of their own, share one weight server.

    client  --HTTP-->  app (requests -> jobs)  -->  pool  --socket-->  worker (generation: job -> pieces of text)
                                                                          |  maps the weights of
                                                                     weight server

The front (`app`, `pool`) never loads torch; a worker generates one text at a time.
"""
