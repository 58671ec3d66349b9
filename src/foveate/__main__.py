"""`python -m foveate` is the `foveate` command."""

from foveate.cli.main import main

raise SystemExit(main())
