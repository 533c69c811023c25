"""Log-sum-exp of all pairwise similarities and its gradient, without the matrix of pairs.

The one operation every contrastive loss here is made of. Rows x and columns y are unit vectors;
logit (i, j) is `scale * x_i · y_j`, and pairs with equal ids are left out (an anchor with itself,
with its positive, with another performance of the same composition).

    forward(x, y, x_ids, y_ids, scale)                         -> Statistics of rows and columns
    backward(x, y, x_ids, y_ids, scale, row_lse, column_lse,
             row_cotangent, column_cotangent)                  -> (W y, Wᵀ x), float32

where W is the gradient with respect to the logits; times `scale` that gives the gradients of x
and y. `blockwise`, `pallas_tpu` and `pallas_gpu` implement the two; `pairs` chooses between them,
makes the operation differentiable and runs it as a ring over devices.

Sizes: N rows, M columns, E embedding width.
"""
