#!/bin/bash
# Train on two nodes without a shared file system: two network namespaces of this machine, each with its own /mnt.
# Needs Linux and root.
#
#   tools/two_nodes.sh PYTHON [setting=value ...]
set -euo pipefail
python=$(realpath -s "$1")
shift
names=(cgrpo-node-0 cgrpo-node-1)
folder=$(mktemp -d)

clean() {
    for name in "${names[@]}"; do ip netns delete "$name" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap clean EXIT

for name in "${names[@]}"; do
    ip netns add "$name"
    ip -n "$name" link set lo up
done
ip link add eth-run netns "${names[0]}" type veth peer name eth-run netns "${names[1]}"
for node in 0 1; do
    ip -n "${names[$node]}" address add "10.77.0.$((node + 1))/24" dev eth-run
    ip -n "${names[$node]}" link set eth-run up
done

# Each `ip netns exec` has mounts of its own. What node 0 writes is copied out when it is done.
for node in 0 1; do
    ip netns exec "${names[$node]}" bash -c '
        mount -t tmpfs none /mnt && cd /mnt
        GLOO_SOCKET_IFNAME=eth-run "$0" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 \
            --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29500 \
            --rdzv_conf is_host=$((1 - '"$node"')) --local_addr "10.77.0.$(('"$node"' + 1))" \
            -m customized_grpo train output=run training.sharding=fsdp2 "$@"
        echo "node '"$node"' holds $(find /mnt -type f | wc -l) files"
    ' "$python" policy.device=cpu training.iterations=2 training.prompts_per_iteration=2 rollout.num_generations=2 \
        rollout.num_inference_steps=4 evaluation.examples=2 evaluation.replicates=1 evaluation.every=0 \
        policy.dtype=float32 'tracking.log_with=[]' training.preflight=false "$@" \
        >"$folder/$node.txt" 2>&1 &
    nodes[node]=$!
done
for node in 0 1; do
    wait "${nodes[$node]}" || { cat "$folder/$node.txt"; exit 1; }
    sed "s/^/node $node: /" "$folder/$node.txt"
done
