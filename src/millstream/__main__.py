"""`python -m millstream`: the command line."""

from millstream.cli.main import main

raise SystemExit(main())
