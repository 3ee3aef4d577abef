from customized_grpo.cli.main import program

program()
