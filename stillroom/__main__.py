from stillroom.cli import main

raise SystemExit(main())
