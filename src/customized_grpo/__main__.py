from customized_grpo.cli.main import main

main()
