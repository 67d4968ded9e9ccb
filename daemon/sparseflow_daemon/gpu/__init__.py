"""What the server does on GPUs, by a child process on each.

In the server: `children`, each with a `desk`; `pushing` and `lending`, which sessions ask for. In the child: `child`,
`work`, `slab`, `regions`.
"""
